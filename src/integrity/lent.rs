//! Pointers of the kernel's that it lets others set: where they may lead besides its own
//! text, by who sets them.

use super::owner::{bpf_program, Owner, Owners};
use super::view::View;
use crate::kernel::Gva;

/// Who may set one.
#[derive(Clone, Copy)]
enum Borrower {
    /// The module of this name.
    Module(&'static str),
    /// BPF, for the code of this name.
    Bpf(&'static str),
}

/// A static call's key; its name follows.
const KEY: &str = "__SCK__";
/// Static calls by their names, and a variable.
const LENT: [(&str, Borrower); 5] = [
    // perf_register_guest_info_callbacks(), kernel/events/core.c, by virt/kvm/kvm_main.c,
    ("__perf_guest_state", Borrower::Module("kvm")),
    ("__perf_guest_get_ip", Borrower::Module("kvm")),
    // of arch/x86/kvm/vmx/vmx.c the one function.
    (
        "__perf_guest_handle_intel_pt_intr",
        Borrower::Module("kvm_intel"),
    ),
    // kvm_set_posted_intr_wakeup_handler(), arch/x86/kernel/irq.c, by
    // arch/x86/kvm/vmx/vmx.c.
    (
        "kvm_posted_intr_wakeup_handler",
        Borrower::Module("kvm_intel"),
    ),
    // bpf_dispatcher_update(), kernel/bpf/dispatcher.c.
    (
        "bpf_dispatcher_xdp_call",
        Borrower::Bpf("bpf_dispatcher_xdp"),
    ),
];

/// Whether what is called `name`, a variable or a static call or its key, may lead to
/// `to`, which is none of the kernel's text.
pub(super) fn may_lead(view: &View<'_>, owners: &Owners, name: &str, to: Gva) -> bool {
    let name = name.strip_prefix(KEY).unwrap_or(name);
    let lent = LENT.iter().find(|(known, _)| *known == name);
    lent.is_some_and(|(_, borrower)| match borrower {
        Borrower::Module(module) => owners.module_with_code(to) == Some(module),
        Borrower::Bpf(program) => owners.owner(view, to) == Owner::Made(bpf_program(program)),
    })
}
