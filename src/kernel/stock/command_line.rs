//! What a guest without the patch has to be booted with.

/// The size of each CPU's ring that is proposed: at 68 MB of records a second
/// it lasts 120 ms, and the helper reads every 3 ms.
const BUFFER: &str = "8M";
/// The size of all CPUs' rings together where they lie in memory reserved at boot.
const RESERVED: &str = "24M";
/// Stands for functions that nobody has named yet. Without a name, or with none that
/// the kernel has, it would record all of its functions.
const FUNCTIONS: &str = "FUNCTION,..";

/// The kernel parameters (Documentation/admin-guide/kernel-parameters.txt)
/// that have a stock kernel record calls of `functions`, by the names that
/// Ftrace knows, from its start on. Where there are none, a word in capitals stands
/// for them, which whoever reads this is to replace.
pub fn command_line<S: AsRef<str>>(functions: &[S]) -> String {
    format!(
        "ftrace=function_graph {} trace_buf_size={BUFFER}",
        filter(functions)
    )
}

/// The same for a ring buffer in memory that is reserved at boot: the parameters, and
/// what is to be typed in the guest once it has booted, since no parameter sets the
/// tracer of an instance.
pub fn reserved_command_line<S: AsRef<str>>(functions: &[S]) -> (String, String) {
    (
        format!(
            "{} reserve_mem={RESERVED}:4096:xf trace_instance=xf@xf",
            filter(functions)
        ),
        set_tracer("xf"),
    )
}

/// What is to be typed in a guest, so that an instance records. The name is the guest's
/// word: one that a shell could take for more than a name is not repeated.
pub(crate) fn set_tracer(instance: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let is_plain = instance.chars().all(plain) && instance.contains(|c: char| c != '.');
    let (instance, note) = match is_plain {
        true => (instance, ""),
        false => (
            "INSTANCE",
            "    (INSTANCE being the one in /sys/kernel/tracing/instances)",
        ),
    };
    format!("echo function_graph > /sys/kernel/tracing/instances/{instance}/current_tracer{note}")
}

/// Whether parameters are of [`reserved_command_line`].
pub fn is_reserved(parameters: &str) -> bool {
    parameters.contains(" trace_instance=")
}

fn filter<S: AsRef<str>>(functions: &[S]) -> String {
    let names: Vec<&str> = functions.iter().map(AsRef::as_ref).collect();
    let names = match names.as_slice() {
        [] => FUNCTIONS.to_owned(),
        names => names.join(","),
    };
    format!("ftrace_graph_filter={names}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_puts_no_command_into_what_is_to_be_typed() {
        assert!(set_tracer("my_ring-1.2").contains("/instances/my_ring-1.2/"));
        for name in [
            "",
            ".",
            "..",
            "x; reboot",
            "$(x)",
            "a/../b",
            "x`y`",
            "a\\nb",
            "a'b",
        ] {
            assert!(set_tracer(name).contains("/instances/INSTANCE/"), "{name}");
        }
    }
}
