//! The classes of hooks that the lab can put into a guest: how each is put
//! there, and what has to find it. `detect.rs` runs them, and writes the table
//! of docs/detection.md from what came out.

use xftrace::detect::Rule;

/// Kernels that find a system call's function by a switch.
const BY_SWITCH: [&str; 2] = ["6.1", "6.12"];
/// The lab's kernel that finds it in `sys_call_table`, as all did up to 6.1.84.
const BY_TABLE: [&str; 1] = ["6.1-table"];
/// All of them: each has a guest.
pub(crate) const KERNELS: [&str; 3] = [BY_SWITCH[0], BY_SWITCH[1], BY_TABLE[0]];

/// What is traced while classes are tried: what `uses` (tests/lab/guest) does
/// goes through these.
pub(crate) const FUNCTIONS: [&str; 5] = [
    "sys_getdents64",
    "sys_openat",
    "sys_read",
    "sys_newuname",
    "sys_execve",
];

/// A shell command of the guest's that comes before all of them: where some of its
/// symbols are, which would show in a trace if it was asked for then.
pub(crate) const PREPARE: &str = "for name in xftrace_control xftrace_seq; do \
    grep -w $name /proc/kallsyms | cut -d' ' -f1 > /tmp/$name; done";

/// A class of hooks.
pub(crate) struct Class {
    /// Names it in the table.
    pub(crate) name: &'static str,
    /// What is done to the guest, for the table.
    pub(crate) what: &'static str,
    /// The kernels that it is tried on.
    pub(crate) kernels: &'static [&'static str],
    /// How it gets there.
    pub(crate) by: By,
    /// Whether calls of 64-bit programs go another way than in a clean kernel.
    pub(crate) bends: bool,
    /// What the call flow shows.
    pub(crate) flow: Shows<Rule>,
    /// What memory shows.
    pub(crate) memory: Shows<Place>,
}

/// How a hook gets into a guest, and out of it again.
pub(crate) enum By {
    /// The module of this name.
    Module(&'static str),
    /// These shell commands of the guest's.
    Commands(&'static str, &'static str),
}

impl By {
    /// A shell command that puts it there,
    pub(crate) fn plant(&self) -> String {
        match self {
            Self::Module(module) => format!("insmod /lib/modules/{module}.ko"),
            Self::Commands(plant, _) => (*plant).to_owned(),
        }
    }

    /// and one that takes it away.
    pub(crate) fn remove(&self) -> String {
        match self {
            Self::Module(module) => format!("rmmod {module}"),
            Self::Commands(_, remove) => (*remove).to_owned(),
        }
    }
}

/// What one of the two ways to look has to show.
pub(crate) enum Shows<What> {
    /// The hook, by this.
    It(What),
    /// Nothing; and why, for the table.
    Nothing(&'static str),
}

/// What a look at memory has to find.
pub(crate) struct Place {
    /// The check that finds it.
    pub(crate) check: &'static str,
    /// How the finding's place begins.
    pub(crate) at: &'static str,
    /// What is said of who owns the address that is there.
    pub(crate) owner: &'static str,
}

const fn at(check: &'static str, at: &'static str, owner: &'static str) -> Shows<Place> {
    Shows::It(Place { check, at, owner })
}

/// All classes.
pub(crate) const CLASSES: [Class; 16] = [
    Class {
        name: "syscall_table",
        what: "an entry of `sys_call_table`",
        kernels: &BY_TABLE,
        by: By::Module("hook_syscall_table"),
        bends: true,
        flow: Shows::It(Rule::WrongCaller),
        memory: at(
            "read-only-data",
            "sys_call_table[217]",
            "hook_syscall_table",
        ),
    },
    Class {
        name: "syscall_table, unused",
        what: "the same on a kernel that does not call through it",
        kernels: &BY_SWITCH,
        by: By::Module("hook_syscall_table"),
        bends: false,
        flow: Shows::Nothing("the kernel never goes there"),
        memory: at(
            "read-only-data",
            "sys_call_table[217]",
            "hook_syscall_table",
        ),
    },
    Class {
        name: "dispatch",
        what: "the jump inside `x64_sys_call`",
        kernels: &BY_SWITCH,
        by: By::Module("hook_dispatch"),
        bends: true,
        flow: Shows::It(Rule::WrongCaller),
        memory: at("kernel-text", "x64_sys_call+", "hook_dispatch"),
    },
    Class {
        name: "inline",
        what: "a jump where `uname` begins, over Ftrace's call",
        kernels: &BY_SWITCH,
        by: By::Module("hook_inline"),
        bends: true,
        // What it was put over is what makes records: the call is missing.
        flow: Shows::It(Rule::UnknownSequence),
        memory: at("kernel-text", "__x64_sys_newuname", "hook_inline"),
    },
    Class {
        name: "procroot",
        what: "the file operations of /proc's root",
        kernels: &BY_SWITCH,
        by: By::Module("hook_procroot"),
        bends: true,
        flow: Shows::It(Rule::UnknownModule),
        memory: at(
            "files",
            "i_fop of the root of a mounted proc",
            "hook_procroot",
        ),
    },
    Class {
        name: "notrace",
        what: "the same by a function that Ftrace does not see",
        kernels: &BY_SWITCH,
        by: By::Module("hook_notrace"),
        bends: true,
        // By the return addresses of what it calls.
        flow: Shows::It(Rule::UnknownModule),
        memory: at(
            "files",
            "i_fop of the root of a mounted proc",
            "hook_notrace",
        ),
    },
    Class {
        name: "hidden",
        what: "the same by a module that took itself off the list",
        kernels: &BY_SWITCH,
        by: By::Commands(
            "insmod /lib/modules/hook_procroot.ko hide=1; ! grep hook_ /proc/modules",
            "echo 0 > /sys/module/hook_procroot/parameters/hide; rmmod hook_procroot",
        ),
        bends: true,
        flow: Shows::It(Rule::UnlistedModule),
        memory: at("unowned-code", "0xffffffff", "nobody"),
    },
    Class {
        name: "seq",
        what: "a function of `tcp4_seq_ops`, for /proc/net/tcp",
        kernels: &BY_SWITCH,
        by: By::Module("hook_seq"),
        bends: true,
        flow: Shows::It(Rule::UnknownModule),
        memory: at("read-only-data", "tcp4_seq_ops+", "hook_seq"),
    },
    Class {
        name: "ftrace",
        what: "Ftrace told to go on elsewhere (IPMODIFY)",
        kernels: &BY_SWITCH,
        by: By::Module("hook_ftrace"),
        bends: true,
        flow: Shows::It(Rule::NestedInItself),
        memory: at("ftrace", "Ftrace's callback", "hook_ftrace"),
    },
    Class {
        name: "kprobe",
        what: "a probe",
        kernels: &BY_SWITCH,
        by: By::Module("hook_kprobe"),
        bends: true,
        flow: Shows::It(Rule::UnknownModule),
        memory: at("kprobes", "kprobe at iterate_dir", "hook_kprobe"),
    },
    Class {
        name: "kretprobe",
        what: "a return probe",
        kernels: &BY_SWITCH,
        by: By::Module("hook_kretprobe"),
        bends: true,
        flow: Shows::It(Rule::UnknownModule),
        memory: at("kprobes", "kretprobe at ", "hook_kretprobe"),
    },
    Class {
        name: "tracepoint",
        what: "a function at the tracepoint `sched_process_exec`",
        kernels: &BY_SWITCH,
        by: By::Module("hook_tracepoint"),
        bends: true,
        flow: Shows::It(Rule::UnknownModule),
        memory: at(
            "tracepoints",
            "tracepoint sched_process_exec",
            "hook_tracepoint",
        ),
    },
    Class {
        name: "bpf",
        what: "a BPF program at the same tracepoint",
        kernels: &BY_SWITCH,
        by: By::Commands("bpfprobe", "killall bpfprobe"),
        bends: true,
        flow: Shows::It(Rule::UnlistedModule),
        memory: at(
            "tracepoints",
            "tracepoint sched_process_exec",
            "a BPF program",
        ),
    },
    Class {
        name: "idt",
        what: "the gate of `int 0x80`",
        kernels: &BY_SWITCH,
        by: By::Module("hook_idt"),
        bends: false,
        flow: Shows::Nothing(
            "only 32-bit calls go there, and it jumps on before anything that is traced begins",
        ),
        memory: at("interrupts", "interrupt gate 0x80", "hook_idt"),
    },
    Class {
        name: "forged",
        what: "a record that the guest wrote into the ring buffer itself",
        kernels: &BY_SWITCH,
        by: By::Commands(
            "insmod /lib/modules/xf_forge.ko how=nokey \
                control=0x$(cat /tmp/xftrace_control) \
                seq=0x$(cat /tmp/xftrace_seq)",
            "rmmod xf_forge",
        ),
        bends: false,
        flow: Shows::It(Rule::ForgedRecord),
        memory: Shows::Nothing("a record bends nothing, and is no part of the kernel"),
    },
    Class {
        name: "recording-off",
        what: "the ring buffer told to take no records, past tracefs and xftrace's switch",
        kernels: &BY_SWITCH,
        by: By::Commands(
            "insmod /lib/modules/xf_off.ko \
                control=0x$(cat /tmp/xftrace_control)",
            "rmmod xf_off",
        ),
        bends: false,
        flow: Shows::It(Rule::RecordingOff),
        memory: Shows::Nothing("whether a buffer records is for its user to say: no hook"),
    },
];

#[test]
fn every_class_is_found_and_what_bends_calls_by_the_call_flow_alone() {
    for class in &CLASSES {
        let by_flow = matches!(class.flow, Shows::It(_));
        let by_memory = matches!(class.memory, Shows::It(_));
        assert!(by_flow || by_memory, "{}", class.name);
        assert!(by_flow || !class.bends, "{}", class.name);
        let of_name = CLASSES.iter().filter(|other| other.name == class.name);
        assert_eq!(of_name.count(), 1, "{}", class.name);
    }
}
