//! `xftrace enroll` as it is to be typed for a domain that is enrolled already.
//!
//! Enrolling sets all options anew, so that a command which names only what is to be
//! changed would take the others away.

use crate::kernel::stock::is_reserved;
use crate::libvirt::shell_word;
use crate::libvirt::xml::Trace;

/// The command that enrols the domain with these options; `name` is as a shell takes it.
/// What is for its kernel's command line is made anew by `--plain`.
pub(super) fn enroll_command(name: &str, trace: &Trace) -> String {
    let mut command = format!("xftrace enroll {name}");
    let mut option = |flag: &str, value: Option<String>| {
        if let Some(value) = value {
            command.push_str(&format!(" {flag} {}", shell_word(&value)));
        }
    };
    let functions = (!trace.functions.is_empty()).then(|| trace.functions.join(","));
    option("--functions", functions);
    let interval = trace.interval.map(humantime::format_duration);
    option(
        "--interval",
        interval.map(|interval| interval.to_string().replace(' ', "")),
    );
    let symbols = trace.symbols.as_ref();
    option(
        "--symbols",
        symbols.map(|file| file.to_string_lossy().into_owned()),
    );
    option("--baseline", trace.baseline.clone());
    let looks = trace.integrity_interval.as_ref();
    option(
        "--integrity-interval",
        looks.map(|looks| looks.to_string().replace(' ', "")),
    );
    if trace.at_start {
        command.push_str(" --at-start");
    }
    match &trace.cmdline {
        None => {}
        Some(boot) if is_reserved(boot) => command.push_str(" --plain=reserved"),
        Some(_) => command.push_str(" --plain"),
    }
    command
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use clap::Parser;

    use super::*;
    use crate::cli::args::{Cli, Command, PlainRing};
    use crate::config::IntegrityInterval;
    use crate::kernel::stock::{command_line, reserved_command_line};

    #[test]
    fn typed_it_asks_for_all_that_there_is() {
        assert_eq!(
            enroll_command("web1", &Trace::default()),
            "xftrace enroll web1"
        );
        let mut trace = Trace::default();
        trace.functions = vec!["sys_read".to_owned(), "vfs_read".to_owned()];
        trace.interval = Some(Duration::from_millis(61_500));
        trace.at_start = true;
        trace.symbols = Some("/srv/a b/System.map".into());
        trace.baseline = Some("web".to_owned());
        trace.integrity_interval = Some(IntegrityInterval(Some(Duration::from_secs(90))));
        trace.cmdline = Some("ftrace=function_graph".to_owned());
        let command = enroll_command("web1", &trace);
        let typed = command.replace("'/srv/a b/System.map'", "/srv/a\u{a0}b/System.map");
        let cli = Cli::try_parse_from(typed.split(' ')).unwrap_or_else(|error| panic!("{error}"));
        let Command::Enroll(args) = cli.command else {
            panic!("{command}");
        };
        assert_eq!(args.functions, trace.functions);
        assert_eq!(args.interval, trace.interval);
        assert_eq!(args.symbols, Some("/srv/a\u{a0}b/System.map".into()));
        assert_eq!(args.baseline, trace.baseline);
        assert_eq!(args.integrity_interval, trace.integrity_interval);
        assert!(args.at_start);
        assert_eq!(args.plain, Some(PlainRing::Global));
    }

    #[test]
    fn the_ring_stays_where_it_was() {
        let mut trace = Trace::default();
        trace.functions = vec!["vfs_read".to_owned()];
        for (boot, ring) in [
            (command_line(&["vfs_read"]), PlainRing::Global),
            (reserved_command_line(&["vfs_read"]).0, PlainRing::Reserved),
        ] {
            trace.cmdline = Some(boot);
            let command = enroll_command("web1", &trace);
            let cli = Cli::try_parse_from(command.split(' ')).unwrap();
            let Command::Enroll(args) = cli.command else {
                panic!("{command}");
            };
            assert_eq!(args.plain, Some(ring), "{command}");
        }
    }
}
