//! The columns of function_graph, byte for byte as the kernel prints them
//! where it has them (kernel/trace/trace_functions_graph.c).

use super::super::escape::{push_guest, SYMBOL_WIDTH};
use crate::callflow::{Kind, Place};
use crate::ring::record::Task;

/// How wide the task column is; the kernel's is 14, and cuts names to 7.
const TASK_WIDTH: usize = 18;

/// `"%*lu"`, with `fill` to the left.
pub(super) fn push_number(out: &mut Vec<u8>, number: u64, width: usize, fill: u8) {
    let mut digits = [0; 20];
    let mut at = digits.len();
    let mut rest = number;
    loop {
        at -= 1;
        digits[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    let digits = &digits[at..];
    out.resize(out.len() + width.saturating_sub(digits.len()), fill);
    out.extend_from_slice(digits);
}

/// `"%#lx"`.
pub(super) fn push_hex(out: &mut Vec<u8>, number: u64) {
    out.extend_from_slice(b"0x");
    let digits = (64 - number.leading_zeros()).div_ceil(4).max(1);
    for digit in (0..digits).rev() {
        out.push(b"0123456789abcdef"[(number >> (digit * 4) & 15) as usize]);
    }
}

/// Spaces.
pub(super) fn push_spaces(out: &mut Vec<u8>, number: usize) {
    out.resize(out.len() + number, b' ');
}

/// The mark before a duration in nanoseconds: `trace_find_mark`
/// (kernel/trace/trace_output.c).
pub(super) fn mark(duration: u64) -> u8 {
    const MARKS: [(u64, u8); 6] = [
        (1_000_000_000, b'$'),
        (100_000_000, b'@'),
        (10_000_000, b'*'),
        (1_000_000, b'#'),
        (100_000, b'!'),
        (10_000, b'+'),
    ];
    MARKS
        .iter()
        .find(|(above, _)| duration > *above)
        .map_or(b' ', |&(_, mark)| mark)
}

/// The duration column with its mark, 14 bytes wide as long as it takes less
/// than 10 seconds: `trace_print_graph_duration`.
pub(super) fn push_duration(out: &mut Vec<u8>, duration: u64) {
    out.extend_from_slice(&[mark(duration), b' ']);
    let start = out.len();
    push_number(out, duration / 1000, 0, b' ');
    let digits = out.len() - start;
    if digits < 7 {
        // No more than 7 digits in all: the last ones give way.
        out.push(b'.');
        let fraction = out.len();
        push_number(out, duration % 1000, 3, b'0');
        out.truncate(fraction + (7 - digits).min(3));
    }
    let width = out.len() - start;
    out.extend_from_slice(b" us ");
    push_spaces(out, 8usize.saturating_sub(width));
    out.extend_from_slice(b"|  ");
}

/// The task column, centred: `print_graph_proc`, with the name `trace_find_cmdline`
/// gives to those that have none. `unsure`: who the task is nobody vouches for.
pub(super) fn push_task(out: &mut Vec<u8>, task: &Task, unsure: bool) {
    let start = out.len();
    push_spaces(out, TASK_WIDTH / 2);
    let text = out.len();
    push_name(out, task, unsure);
    let width = out.len() - text;
    let spaces = TASK_WIDTH.saturating_sub(width);
    let left = spaces / 2;
    if left < TASK_WIDTH / 2 {
        out.copy_within(text.., start + left);
        out.truncate(start + left + width);
    }
    push_spaces(out, spaces - left);
}

/// A task as `name-pid`.
pub(super) fn push_name(out: &mut Vec<u8>, task: &Task, unsure: bool) {
    match &task.comm {
        _ if unsure => out.push(b'?'),
        _ if task.pid == 0 => out.extend_from_slice(b"<idle>"),
        Some(comm) => push_guest(out, comm.bytes(), 15),
        None => out.extend_from_slice(b"<...>"),
    }
    out.push(b'-');
    if task.pid < 0 {
        out.push(b'-');
    }
    push_number(out, task.pid.unsigned_abs().into(), 0, b' ');
}

/// A function by the address it is entered at.
pub(super) fn push_function(out: &mut Vec<u8>, func: &Place<'_>) {
    let symbol = func.entered();
    let told = || func.told_entered().map(|(symbol, _)| symbol);
    match symbol.or_else(told) {
        Some(symbol) => push_guest(out, symbol.as_bytes(), SYMBOL_WIDTH),
        None => return push_place(out, func),
    }
    push_module(out, func);
}

/// A symbol's module, as the kernel's `%ps` has it; with a question mark where it
/// is the guest's word.
fn push_module(out: &mut Vec<u8>, place: &Place<'_>) {
    let told = place.name.told.map(|told| (told.module, true));
    if let Some((module, asked)) = place.name.module.map(|module| (module, false)).or(told) {
        out.extend_from_slice(b" [");
        push_guest(out, module.as_bytes(), SYMBOL_WIDTH);
        out.extend_from_slice(if asked { b"?]" } else { b"]" });
    }
}

/// An address as `symbol+0x1c`; without a symbol as a number, and marked.
pub(super) fn push_place(out: &mut Vec<u8>, place: &Place<'_>) {
    let told = place.name.told;
    match place.name.symbol.or(told.and_then(|told| told.symbol)) {
        Some((symbol, offset)) => {
            push_guest(out, symbol.as_bytes(), SYMBOL_WIDTH);
            out.push(b'+');
            push_hex(out, offset);
            push_module(out, place);
            return;
        }
        None => push_hex(out, place.address.0),
    }
    if told.is_some() {
        push_module(out, place);
        return;
    }
    out.extend_from_slice(match place.name.kind {
        Kind::Kernel => b" [no symbol]",
        Kind::Module => b" [module]",
        Kind::Outside => b" [outside]",
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::callflow::Name;
    use crate::kernel::Gva;
    use crate::session::GuestName;

    fn text(push: impl FnOnce(&mut Vec<u8>)) -> String {
        let mut out = Vec::new();
        push(&mut out);
        String::from_utf8(out).expect("columns are ASCII")
    }

    #[test]
    fn durations_are_those_of_the_kernel() {
        // The column as 6.1 prints it, worked out by hand from its source.
        for (ns, column) in [
            (0, "  0.000 us    |  "),
            (999, "  0.999 us    |  "),
            (1_234, "  1.234 us    |  "),
            (10_000, "  10.000 us   |  "),
            (10_001, "+ 10.001 us   |  "),
            (123_456, "! 123.456 us  |  "),
            (1_234_567, "# 1234.567 us |  "),
            (12_345_678, "* 12345.67 us |  "),
            (123_456_789, "@ 123456.7 us |  "),
            (1_234_567_890, "$ 1234567 us  |  "),
            (12_345_678_901, "$ 12345678 us |  "),
            (u64::MAX, "$ 18446744073709551 us |  "),
        ] {
            assert_eq!(text(|out| push_duration(out, ns)), column, "{ns} ns");
        }
    }

    #[test]
    fn tasks_are_centred() {
        let task = |pid, comm: &str| Task {
            pid,
            comm: Some(comm.into()),
        };
        let column = |task: Task| text(|out| push_task(out, &task, false));
        assert_eq!(column(task(12, "sh")), "      sh-12       ");
        assert_eq!(column(task(123, "sh")), "      sh-123      ");
        assert_eq!(column(task(7, "a-name-of-15-by")), "a-name-of-15-by-7 ");
        assert_eq!(
            column(task(i32::MIN, "\u{1b}[2Jabc")),
            r"\x1b[2Jabc--2147483648"
        );
        assert_eq!(column(Task { pid: 0, comm: None }), "     <idle>-0     ");
        assert_eq!(column(Task { pid: 5, comm: None }), "     <...>-5      ");
        assert_eq!(
            text(|out| push_task(out, &task(5, "sh"), true)),
            "       ?-5        "
        );
    }

    #[test]
    fn places_are_shown_as_far_as_they_are_known() {
        let place = |symbol, module, kind| Place {
            address: Gva(0xffff_ffff_c000_0020),
            name: Name {
                symbol,
                module,
                kind,
                irq_entry: false,
                told: None,
            },
        };
        let both = |place: Place<'_>| {
            (
                text(|out| push_function(out, &place)),
                text(|out| push_place(out, &place)),
            )
        };
        for (symbol, module, kind, function, shown) in [
            (
                Some(("vfs_read", 0)),
                None,
                Kind::Kernel,
                "vfs_read",
                "vfs_read+0x0",
            ),
            (
                Some(("vfs_read", 32)),
                None,
                Kind::Kernel,
                "vfs_read+0x20",
                "vfs_read+0x20",
            ),
            (
                Some(("f", 0)),
                Some("ext4"),
                Kind::Module,
                "f [ext4]",
                "f+0x0 [ext4]",
            ),
            (
                Some(("f", 9)),
                Some("ext4"),
                Kind::Module,
                "f+0x9 [ext4]",
                "f+0x9 [ext4]",
            ),
        ] {
            let (as_function, as_place) = both(place(symbol, module, kind));
            assert_eq!((as_function.as_str(), as_place.as_str()), (function, shown));
        }
        for (kind, mark) in [
            (Kind::Kernel, "no symbol"),
            (Kind::Module, "module"),
            (Kind::Outside, "outside"),
        ] {
            let shown = format!("0xffffffffc0000020 [{mark}]");
            assert_eq!(both(place(None, None, kind)), (shown.clone(), shown));
        }
    }

    #[test]
    fn what_the_guest_says_is_marked_and_never_instead_of_what_the_host_knows() {
        let place = |symbol, module, told| Place {
            address: Gva(0xffff_ffff_c000_0020),
            name: Name {
                symbol,
                module,
                kind: Kind::Module,
                irq_entry: false,
                told: Some(GuestName {
                    module: "evil",
                    symbol: told,
                }),
            },
        };
        for (place, function, shown) in [
            (
                place(None, None, Some(("f", 4))),
                "f [evil?]",
                "f+0x4 [evil?]",
            ),
            (
                place(None, None, Some(("f", 5))),
                "f+0x5 [evil?]",
                "f+0x5 [evil?]",
            ),
            (
                place(None, None, None),
                "0xffffffffc0000020 [evil?]",
                "0xffffffffc0000020 [evil?]",
            ),
            (
                place(Some(("g", 0)), Some("ext4"), Some(("f", 0))),
                "g [ext4]",
                "g+0x0 [ext4]",
            ),
        ] {
            assert_eq!(text(|out| push_function(out, &place)), function);
            assert_eq!(text(|out| push_place(out, &place)), shown);
        }
    }

    #[test]
    fn numbers_are_padded() {
        assert_eq!(text(|out| push_number(out, 42, 6, b'0')), "000042");
        assert_eq!(
            text(|out| push_number(out, u64::MAX, 3, b' ')),
            u64::MAX.to_string()
        );
        assert_eq!(text(|out| push_hex(out, 0)), "0x0");
        assert_eq!(text(|out| push_hex(out, 0xabc)), "0xabc");
        assert_eq!(text(|out| push_hex(out, u64::MAX)), "0xffffffffffffffff");
    }
}
