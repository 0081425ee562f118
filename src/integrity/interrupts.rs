//! The interrupt descriptor table: where the processor enters the kernel.
//!
//! `idt_table` (arch/x86/kernel/idt.c) has 256 gates. Those of exceptions and of
//! `int 0x80` lead to functions whose names are known; all others lead to the
//! stubs of device interrupts and to the entries of the kernel's own, which are
//! functions of the kernel's text with names of their own kind. The processor
//! reads the table through another mapping of it, at a fixed address; that has to
//! lead to the same memory.

use super::finding::{Check, Finding, Report};
use super::owner::Owners;
use super::view::{Obstacle, View};
use crate::kernel::Gva;

const GATES: usize = 256;
const GATE: usize = 16;
/// `__KERNEL_CS`.
const KERNEL_CODE: u16 = 0x10;
/// An interrupt gate of a 64-bit kernel (Intel SDM vol. 3A, 7.14.1); present.
const INTERRUPT_GATE: u8 = 0x8e;
/// The same, that programs may use: `int3`, `into`, `int 0x80`.
const OPEN_GATE: u8 = 0xee;
/// `CPU_ENTRY_AREA_RO_IDT`, arch/x86/include/asm/cpu_entry_area.h and
/// pgtable_64_types.h.
const MAPPED: Gva = Gva(0xffff_fe00_0000_0000);
/// `FIRST_EXTERNAL_VECTOR`.
const FIRST_DEVICE: usize = 0x20;
const INT_80: usize = 0x80;

/// The entries of exceptions, by vector (arch/x86/kernel/idt.c).
const EXCEPTIONS: [(usize, &str); 23] = [
    (0, "asm_exc_divide_error"),
    (1, "asm_exc_debug"),
    (2, "asm_exc_nmi"),
    (3, "asm_exc_int3"),
    (4, "asm_exc_overflow"),
    (5, "asm_exc_bounds"),
    (6, "asm_exc_invalid_op"),
    (7, "asm_exc_device_not_available"),
    (8, "asm_exc_double_fault"),
    (9, "asm_exc_coproc_segment_overrun"),
    (10, "asm_exc_invalid_tss"),
    (11, "asm_exc_segment_not_present"),
    (12, "asm_exc_stack_segment"),
    (13, "asm_exc_general_protection"),
    (14, "asm_exc_page_fault"),
    (15, "asm_exc_spurious_interrupt_bug"),
    (16, "asm_exc_coprocessor_error"),
    (17, "asm_exc_alignment_check"),
    (18, "asm_exc_machine_check"),
    (19, "asm_exc_simd_coprocessor_error"),
    (20, "asm_exc_virtualization_exception"),
    (21, "asm_exc_control_protection"),
    (29, "asm_exc_vmm_communication"),
];
/// Where the kernel's gates lead while it starts (arch/x86/kernel/head_64.S):
/// stubs of 9 bytes each, or of 13 where they begin with ENDBR. Vectors that the
/// kernel has no entry for keep theirs, whose code is freed.
const EARLY: &str = "early_idt_handler_array";
const EARLY_STUBS: [u64; 2] = [9, 13];
/// What `int 0x80` leads to, in 6.1 and later, and since 6.7.
const SYSTEM_CALL: [&str; 2] = ["entry_INT80_compat", "asm_int80_emulation"];
/// The tables of stubs (arch/x86/include/asm/idtentry.h); each stub has 8 bytes,
/// or 16 where it begins with ENDBR.
const STUBS: [&str; 2] = ["irq_entries_start", "spurious_entries_start"];
const STUB: u64 = 8;

/// Looks at the table.
pub(super) fn gates(view: &View<'_>, owners: &Owners, report: &mut Report) {
    let doubt = look(view, owners, report).err();
    let looked_at = if doubt.is_some() { 0 } else { GATES as u64 };
    let doubt = doubt.map(|error| error.to_string());
    report.done(Check::Interrupts, looked_at, doubt);
}

fn look(view: &View<'_>, owners: &Owners, report: &mut Report) -> Result<(), Obstacle> {
    const WHAT: &str = "the interrupt descriptor table";
    let table = view.address("idt_table")?;
    let bytes = view.bytes(table, GATES * GATE, WHAT)?;
    for (vector, gate) in bytes.chunks_exact(GATE).enumerate() {
        let Ok(gate) = gate.try_into().map(u128::from_le_bytes) else {
            continue;
        };
        let place = format!("interrupt gate {vector:#04x}");
        let address = table.0.wrapping_add((vector * GATE) as u64);
        if let Some((expected, found, owner)) = judge(view, owners, vector, gate) {
            report.add(Finding {
                check: Check::Interrupts,
                place,
                address,
                expected,
                found,
                owner,
            });
        }
    }
    let there = view.kernel.translate(view.ram, MAPPED);
    let there =
        there.map_err(|_| Obstacle::Lost("the processor's mapping of the table", MAPPED))?;
    let here = view.kernel.translate(view.ram, table);
    let here = here.map_err(|_| Obstacle::Lost(WHAT, table))?;
    if there != here {
        report.add(Finding {
            check: Check::Interrupts,
            place: "the processor's mapping of the interrupt descriptor table".to_owned(),
            address: MAPPED.0,
            expected: format!("idt_table, at {here}"),
            found: there.to_string(),
            owner: None,
        });
    }
    Ok(())
}

/// What should be in a gate and what is there, if that is another thing.
fn judge(
    view: &View<'_>,
    owners: &Owners,
    vector: usize,
    gate: u128,
) -> Option<(String, String, Option<String>)> {
    let bits = (gate >> 40) as u8;
    if gate == 0 {
        return None;
    }
    let offset =
        (gate & 0xffff) | (gate >> 32 & 0xffff_0000) | (gate >> 32 & 0xffff_ffff_0000_0000);
    let target = Gva(offset as u64);
    let segment = (gate >> 16) as u16;
    // Without programs of 32 bits it is a gate like those of devices (idt_setup_traps(),
    // arch/x86/kernel/idt.c, since 6.7).
    let closed = vector == INT_80 && bits == INTERRUPT_GATE && is_device(view, target);
    if closed && segment == KERNEL_CODE {
        return None;
    }
    let open = matches!(vector, 3 | 4 | INT_80);
    let kind = if open { OPEN_GATE } else { INTERRUPT_GATE };
    if (segment, bits) != (KERNEL_CODE, kind) {
        return Some((
            format!("segment {KERNEL_CODE:#x}, type {kind:#x}"),
            format!("segment {segment:#x}, type {bits:#x}"),
            None,
        ));
    }
    let expected = if vector == INT_80 {
        SYSTEM_CALL.join(" or ")
    } else if vector < FIRST_DEVICE {
        let known = EXCEPTIONS.iter().find(|(known, _)| *known == vector);
        known.map_or("nothing", |(_, name)| name).to_owned()
    } else {
        "an entry of the kernel's interrupts".to_owned()
    };
    (!leads(view, vector, target)).then(|| {
        let owner = owners.owner(view, target).to_string();
        (expected, view.name(target), Some(owner))
    })
}

/// Whether a gate leads where it should.
fn leads(view: &View<'_>, vector: usize, target: Gva) -> bool {
    let is = |name: &str| {
        let link = view.symbols.address(name);
        link.is_some_and(|link| view.kernel.runtime(link) == target)
    };
    if vector == INT_80 {
        return SYSTEM_CALL.iter().any(|name| is(name));
    }
    if vector < FIRST_DEVICE {
        let known = EXCEPTIONS.iter().find(|(known, _)| *known == vector);
        // One that this kernel has no entry for keeps what it had at the start.
        let known = known.filter(|(_, name)| view.symbols.address(name).is_some());
        return match known {
            Some((_, name)) => is(name),
            None => is_early(view, vector, target),
        };
    }
    let named = view.symbols.symbol_before(view.kernel.link(target));
    let own = |name: &str| name.starts_with("asm_sysvec_") || name.starts_with("asm_exc_xen");
    let entry = matches!(named, Some((name, 0)) if own(name));
    (view.in_text(target) && entry) || is_device(view, target)
}

/// Whether it is the entry of an interrupt of some device's.
fn is_device(view: &View<'_>, target: Gva) -> bool {
    let named = view.symbols.symbol_before(view.kernel.link(target));
    let is_stub = |(name, offset)| STUBS.contains(&name) && offset % STUB == 0;
    view.in_text(target) && named.is_some_and(is_stub)
}

/// Whether it is the stub that a vector had while the kernel started.
fn is_early(view: &View<'_>, vector: usize, target: Gva) -> bool {
    let Ok(stubs) = view.address(EARLY) else {
        return false;
    };
    let within = target.wrapping_sub(stubs);
    let vector = vector as u64;
    EARLY_STUBS.iter().any(|length| within == vector * length)
}
