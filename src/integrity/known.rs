//! Functions of the kernel's own that it has called back, by their names.
//!
//! That a callback lies in the kernel's text is not enough: some functions of it call
//! on what their argument names (`irq_work_single`), and others end at once, so that the
//! kernel says nothing. Only those that the kernel registers itself are its callbacks.
//! Another one may be of a version that is not known here, or a hook.

use super::view::View;
use crate::kernel::Gva;

/// What a function is called back for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// Where functions begin (`ftrace_ops.func`).
    Function,
    /// There, for all that is registered.
    AllFunctions,
    /// By Ftrace's callback that others are attached through.
    Attached,
    /// Where functions begin that function_graph traces,
    GraphEntry,
    /// and where they return.
    GraphReturn,
    /// Where functions return that an fprobe waits for.
    Return,
    /// By a kprobe or a kretprobe.
    Probe,
    /// At a tracepoint.
    Tracepoint,
}

/// kernel/trace/ftrace.c, fgraph.c, fprobe.c, trace_functions.c, trace_irqsoff.c,
/// trace_sched_wakeup.c, trace_stack.c, trace_event_perf.c, trace_events.c,
/// trace_selftest.c; kernel/kprobes.c, kernel/livepatch/patch.c, fs/pstore/ftrace.c.
const FUNCTION: [&str; 32] = [
    "ftrace_stub",
    "ftrace_ops_nop_func",
    "ftrace_pid_func",
    "function_profile_call",
    "function_trace_probe_call",
    "call_direct_funcs",
    "ftrace_graph_func",
    "fprobe_handler",
    "fprobe_kprobe_handler",
    "fprobe_ftrace_entry",
    "function_trace_call",
    "function_stack_trace_call",
    "function_no_repeats_trace_call",
    "function_stack_no_repeats_trace_call",
    "function_args_trace_call",
    "irqsoff_tracer_call",
    "wakeup_tracer_call",
    "stack_trace_call",
    "perf_ftrace_function_call",
    "function_test_events_call",
    "trace_selftest_test_probe1_func",
    "trace_selftest_test_probe2_func",
    "trace_selftest_test_probe3_func",
    "trace_selftest_test_global_func",
    "trace_selftest_test_dyn_func",
    "trace_selftest_test_recursion_func",
    "trace_selftest_test_recursion_safe_func",
    "trace_selftest_test_regs_func",
    "kprobe_ftrace_handler",
    "klp_ftrace_handler",
    "pstore_ftrace_call",
    "ftrace_ops_assist_func",
];
/// kernel/trace/ftrace.c.
const ALL_FUNCTIONS: [&str; 4] = [
    "ftrace_stub",
    "ftrace_ops_list_func",
    "arch_ftrace_ops_list_func",
    "ftrace_ops_assist_func",
];
/// kernel/trace/trace_fprobe.c, and commands of `set_ftrace_filter`
/// (kernel/trace/trace_functions.c, trace.c, trace_events.c).
const ATTACHED: [&str; 15] = [
    "fentry_dispatcher",
    "fexit_dispatcher",
    "trace_fprobe_entry_handler",
    "ftrace_traceon",
    "ftrace_traceoff",
    "ftrace_traceon_count",
    "ftrace_traceoff_count",
    "ftrace_stacktrace",
    "ftrace_stacktrace_count",
    "ftrace_dump_probe",
    "ftrace_cpudump_probe",
    "ftrace_snapshot",
    "ftrace_count_snapshot",
    "event_enable_probe",
    "event_enable_count_probe",
];
/// kernel/trace/fgraph.c, ftrace.c, fprobe.c, trace_functions_graph.c, trace_irqsoff.c,
/// trace_sched_wakeup.c, and the tests in trace_selftest.c.
const GRAPH_ENTRY: [&str; 12] = [
    "ftrace_graph_entry_stub",
    "ftrace_graph_entry_test",
    "trace_graph_entry",
    "trace_graph_entry_watchdog",
    "profile_graph_entry",
    "irqsoff_graph_entry",
    "wakeup_graph_entry",
    "entry_run",
    "fgraph_pid_func",
    "store_entry",
    "fprobe_entry",
    "fprobe_fgraph_entry",
];
/// The same files.
const GRAPH_RETURN: [&str; 11] = [
    "ftrace_stub",
    "ftrace_stub_graph",
    "ftrace_graph_ret_stub",
    "trace_graph_return",
    "trace_graph_thresh_return",
    "profile_graph_return",
    "irqsoff_graph_return",
    "wakeup_graph_return",
    "return_run",
    "store_return",
    "fprobe_return",
];
/// kernel/kprobes.c, kernel/trace/trace_kprobe.c, kernel/fail_function.c.
const PROBE: [&str; 8] = [
    "aggr_pre_handler",
    "aggr_post_handler",
    "pre_handler_kretprobe",
    "kprobe_dispatcher",
    "kretprobe_dispatcher",
    "trace_kprobe_entry_handler",
    "fei_kprobe_handler",
    "fei_post_handler",
];
/// kernel/trace/trace_sched_switch.c, trace_sched_wakeup.c, trace_syscalls.c,
/// trace_osnoise.c, ftrace.c, fgraph.c; net/core/drop_monitor.c.
const TRACEPOINT: [&str; 25] = [
    "probe_sched_switch",
    "probe_sched_wakeup",
    "probe_wakeup",
    "probe_wakeup_sched_switch",
    "probe_wakeup_migrate_task",
    "ftrace_syscall_enter",
    "ftrace_syscall_exit",
    "perf_syscall_enter",
    "perf_syscall_exit",
    "trace_sched_migrate_callback",
    "trace_sched_switch_callback",
    "trace_irqentry_callback",
    "trace_irqexit_callback",
    "trace_softirq_entry_callback",
    "trace_softirq_exit_callback",
    "ftrace_filter_pid_sched_switch_probe",
    "ftrace_pid_follow_sched_process_fork",
    "ftrace_pid_follow_sched_process_exit",
    "ftrace_graph_probe_sched_switch",
    "trace_kfree_skb_hit",
    "trace_napi_poll_hit",
    "net_dm_packet_trace_kfree_skb_hit",
    "net_dm_packet_trace_napi_poll_hit",
    "net_dm_hw_trap_summary_probe",
    "net_dm_hw_trap_packet_probe",
];
/// Those that each event has (include/trace/trace_events.h, perf.h), and those of
/// kernel/trace/blktrace.c, trace_events.c, trace_osnoise.c.
const TRACEPOINT_PREFIXES: [&str; 5] = [
    "trace_event_raw_event_",
    "perf_trace_",
    "blk_add_trace_",
    "event_filter_pid_sched_",
    "trace_intel_irq_",
];

impl Role {
    fn names(self) -> &'static [&'static str] {
        match self {
            Self::Function => &FUNCTION,
            Self::AllFunctions => &ALL_FUNCTIONS,
            Self::Attached => &ATTACHED,
            Self::GraphEntry => &GRAPH_ENTRY,
            Self::GraphReturn => &GRAPH_RETURN,
            Self::Return => &["fprobe_exit_handler"],
            Self::Probe => &PROBE,
            Self::Tracepoint => &TRACEPOINT,
        }
    }

    /// Whether this function of the kernel's is one that it has called back for it.
    pub(super) fn has(self, view: &View<'_>, function: Gva) -> bool {
        let prefixes: &[&str] = match self {
            Self::Tracepoint => &TRACEPOINT_PREFIXES,
            _ => &[],
        };
        let name = view.name(function);
        let begins = |prefix: &&str| name.starts_with(*prefix) && !name.contains('+');
        view.is_one_of(function, self.names())
            || (view.in_text(function) && prefixes.iter().any(begins))
    }
}

/// That a function of the kernel's is called back which it does not register itself.
pub(super) fn unknown(view: &View<'_>, place: &str, function: Gva) -> String {
    let name = view.name(function);
    format!("{place}: whether the kernel itself registers {name} cannot be told")
}
