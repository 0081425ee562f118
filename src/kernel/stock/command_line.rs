//! What a guest without the patch has to be booted with.

/// The size of each CPU's ring that is proposed: at 68 MB of records a second
/// it lasts 120 ms, and the helper reads every 3 ms.
const BUFFER: &str = "8M";

/// The kernel parameters (Documentation/admin-guide/kernel-parameters.txt)
/// that have a stock kernel record calls of `functions`, by the names that
/// Ftrace knows, from its start on.
pub fn command_line<S: AsRef<str>>(functions: &[S]) -> String {
    let names: Vec<&str> = functions.iter().map(AsRef::as_ref).collect();
    format!(
        "ftrace=function_graph ftrace_graph_filter={} trace_buf_size={BUFFER}",
        names.join(",")
    )
}
