//! The examples in the help are true: each line can be typed, and what it is
//! piped to finds what it is there to find.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{symlink, PermissionsExt};
use std::process::{Command, Output};

use clap::{CommandFactory, Parser};
use xftrace::cli::args::Cli;
use xftrace::session::Counters;

use crate::command::Host;
use crate::growing::{Growing, Record, PAIRED};

/// The lines of all help texts that begin with `xftrace`, without what is said
/// of them behind.
fn examples() -> BTreeSet<String> {
    let cli = Cli::command();
    let texts = cli
        .get_subcommands()
        .chain([&cli])
        .filter_map(|command| command.get_after_long_help());
    let mut lines = BTreeSet::new();
    for text in texts.map(ToString::to_string) {
        let line = |line: &str| {
            let line = line.strip_prefix("  xftrace ")?;
            let typed = line.split("  ").next().unwrap_or(line);
            Some(format!("xftrace {typed}"))
        };
        lines.extend(text.lines().filter_map(line));
    }
    assert!(lines.len() > 25, "{lines:?}");
    lines
}

#[test]
fn every_example_is_a_command_line() {
    for line in examples() {
        let own = line.split(" | ").next().unwrap_or(&line);
        if let Err(error) = Cli::try_parse_from(own.split(' ')) {
            panic!("{line}: {error}");
        }
    }
}

/// A trace that has ended, with a read, a record that is forged, and two that
/// are lost.
pub(crate) fn session() -> Growing {
    let mut growing = Growing::new(1);
    growing.pair();
    growing.add(0, PAIRED, Record::Root);
    growing.add(0, PAIRED + 1000, Record::Forged);
    growing.skip(0, 2);
    growing.add(0, PAIRED + 2000, Record::Call);
    growing.add(0, PAIRED + 3000, Record::Return);
    growing.add(0, PAIRED + 4000, Record::RootReturn);
    growing.writer.meta.counters = Counters {
        lost: 2,
        ..Counters::default()
    };
    growing.close();
    growing
}

#[test]
fn what_examples_are_piped_to_finds_it() {
    let host = Host::new();
    let growing = session();
    xftrace::report::write_graph(growing.dir(), u64::MAX).expect("a call flow");
    let sessions = growing.dir().parent().expect("where sessions lie");
    symlink(sessions, host.path().join("web1.xftrace")).expect("a link");
    let _helper = host.helper(Some(growing.dir()));
    // flamegraph.pl is no package of Debian's; it takes lines that end with a
    // space and a number, and so does this.
    let bin = host.path().join("bin");
    fs::create_dir(&bin).expect("a directory");
    let tool = |name: &str, script: String| {
        let path = bin.join(name);
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).expect("a script");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("a mode");
    };
    tool("flamegraph.pl", "grep -E '^[^ ]+ [0-9]+$'".to_owned());
    tool("xftrace", format!("exec {} \"$@\"", host.shell()));
    let typed = |line: &str| -> Output {
        let path = format!("{}:{}", bin.display(), std::env::var("PATH").expect("PATH"));
        Command::new("sh")
            .args(["-c", line])
            .env("PATH", path)
            .current_dir(host.path())
            .output()
            .expect("a shell")
    };

    let finds: &[(&str, &str)] = &[
        ("xftrace off -o - | less", "vfs_read();"),
        (
            "xftrace status --json | jq '.[].trace.counters.lost'",
            "2\n",
        ),
        (
            "xftrace report -d web1 --format folded | flamegraph.pl > web1.svg",
            "",
        ),
        ("xftrace follow -d web1 | grep '!!'", "!! forged: "),
        (
            "xftrace follow --format json | grep '\"type\":\"lost\"'",
            "\"records\":2",
        ),
        ("xftrace follow | head -100", "vfs_read();"),
        (
            "xftrace check -d web1 --json | jq '.flow.findings[] | .what'",
            "\"records decode under no key: ",
        ),
    ];
    for (line, found) in finds {
        let Output {
            status,
            stdout,
            stderr,
        } = typed(line);
        let (out, said) = (
            String::from_utf8_lossy(&stdout),
            String::from_utf8_lossy(&stderr),
        );
        assert!(status.success(), "{line}: {said}");
        assert!(out.contains(found), "{line} gives {out}{said}");
    }
    let folded = fs::read_to_string(host.path().join("web1.svg")).expect("the graph");
    assert!(folded.contains("cat;__x64_sys_read;vfs_read"), "{folded}");

    let mut piped = examples();
    piped.retain(|line| line.contains(" | "));
    let tried = finds.iter().map(|(line, _)| (*line).to_owned());
    assert_eq!(piped, tried.collect());
}
