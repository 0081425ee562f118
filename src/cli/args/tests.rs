use super::*;
use clap::CommandFactory;

fn parse(line: &[&str]) -> Result<Cli, clap::Error> {
    Cli::try_parse_from([&["xftrace"], line].concat())
}

#[test]
fn the_definition_is_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn on_takes_functions_and_a_domain_in_any_order() {
    for line in [
        ["on", "-d", "web1", "sys_openat", "sys_read"],
        ["on", "sys_openat", "-d", "web1", "sys_read"],
        ["on", "sys_openat", "sys_read", "-d", "web1"],
    ] {
        let Command::On(on) = parse(&line).unwrap().command else {
            panic!("not on");
        };
        assert_eq!(on.domain.domain.as_deref(), Some("web1"));
        assert_eq!(on.functions, ["sys_openat", "sys_read"]);
    }
}

#[test]
fn values_out_of_bounds_are_usage_errors() {
    for line in [
        &["on", "--interval", "9ms"][..],
        &["on", "--interval", "61m"],
        &["on", "--buffer-size", "4K"],
        &["on", "--buffer-size", "2G"],
        &["on", "vfs_read;reboot"],
        &["on", "-d", ""],
        &["enroll"],
        &["enroll", "a", "--functions", "sys_read,,sys_open"],
        &["enroll", "a", "--integrity-interval", "100ms"],
        &["off", "--no-copy", "-o", "x"],
        &["report"],
        &["report", "dir", "-d", "web1"],
        &["check", "dir", "-d", "web1"],
        &["check", "--baseline", "../x"],
        &["baseline"],
        &["baseline", "learn", "web"],
        &["baseline", "show", "a/b"],
        &["helper", "--uuid", "../../etc"],
    ] {
        let error = parse(line).expect_err(&format!("{line:?} is taken"));
        assert_eq!(error.exit_code(), 2, "{line:?}");
    }
}

#[test]
fn the_hook_takes_whatever_libvirt_passes() {
    for line in [
        &["hook"][..],
        &["hook", "web1", "started", "begin", "-"],
        &["hook", "--", "--help", "started", "begin", "-", "more"],
        &["hook", "--", "-d", "--config", "", "-"],
    ] {
        let Command::Hook(hook) = parse(line).unwrap().command else {
            panic!("not hook");
        };
        let passed = line.iter().skip(1).filter(|a| **a != "--").count();
        assert_eq!(hook.arguments.len(), passed, "{line:?}");
    }
}

#[test]
fn global_options_may_follow_the_command() {
    let cli = parse(&["list", "-c", "test:///default", "--config", "/x"]).unwrap();
    assert_eq!(cli.global.connect.as_deref(), Some("test:///default"));
    assert_eq!(cli.global.config_path(), PathBuf::from("/x"));
}
