//! The `xftrace` command: everything it does is in the library.

fn main() -> std::process::ExitCode {
    xftrace::cli::run()
}
