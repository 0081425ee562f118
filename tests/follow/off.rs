//! `xftrace off`: where the call flow goes, and what is said where it cannot.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Output};

use crate::command::Host;
use crate::examples;
use crate::growing::Growing;

/// Types `xftrace off` with these options in the directory `here`.
fn off(host: &Host, here: &Path, options: &str) -> Output {
    Command::new("sh")
        .args(["-c", &format!("{} off {options}", host.shell())])
        .current_dir(here)
        .output()
        .expect("a shell")
}

fn session() -> Growing {
    let mut growing = Growing::new(1);
    growing.close();
    fs::write(growing.dir().join("trace_graph.txt"), "the call flow\n").expect("a file");
    growing
}

/// Root types `off` where others can write, and they have thought of it.
#[test]
fn a_link_is_not_followed() {
    let host = Host::new();
    let growing = session();
    let _helper = host.helper(Some(growing.dir()));
    let here = tempfile::tempdir().expect("a directory");
    let precious = here.path().join("precious");
    fs::write(&precious, "precious").expect("a file");
    symlink(&precious, here.path().join("trace_graph.txt")).expect("a link");
    symlink("/nonexistent/new", here.path().join("dangling")).expect("a link");
    for options in ["", "-o trace_graph.txt", "-o dangling"] {
        let output = off(&host, here.path(), options);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains("a symbolic link"), "{said}");
        // The trace has ended all the same, and is told of.
        assert!(said.contains("is off: 0 records"), "{said}");
        assert!(said.contains("the call flow is in "), "{said}");
    }
    assert_eq!(fs::read_to_string(&precious).expect("the file"), "precious");
}

#[test]
fn a_file_is_replaced_whole() {
    let host = Host::new();
    let growing = session();
    let _helper = host.helper(Some(growing.dir()));
    let here = tempfile::tempdir().expect("a directory");
    let file = here.path().join("trace_graph.txt");
    // Another name of the same file keeps what it had.
    let other = here.path().join("other");
    fs::write(&file, "an older and longer call flow\n").expect("a file");
    fs::hard_link(&file, &other).expect("a second name");
    let output = off(&host, here.path(), "");
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let read = |path: &Path| fs::read_to_string(path).expect("the file");
    assert_eq!(read(&file), "the call flow\n");
    assert_eq!(read(&other), "an older and longer call flow\n");
    let left = fs::read_dir(here.path()).expect("the directory").count();
    assert_eq!(left, 2, "a temporary file was left");
    let nowhere = off(&host, here.path(), "-o none/here.txt");
    assert_eq!(nowhere.status.code(), Some(2), "{nowhere:?}");
}

#[test]
fn a_call_flow_that_could_not_be_written_is_told() {
    let host = Host::new();
    let growing = session();
    let why = "No space left on device";
    let _helper = host.helper_that_could_not_write(growing.dir(), why);
    let here = tempfile::tempdir().expect("a directory");
    let output = off(&host, here.path(), "");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    let report = format!("xftrace report {}", growing.dir().display());
    for text in [why, &report, "is off: 0 records"] {
        assert!(said.contains(text), "{said}");
    }
    assert!(!said.contains("is in"), "{said}");
}

#[test]
fn a_call_flow_that_is_cut_short_says_so_and_where_all_of_it_is_to_be_had() {
    let host = Host::new();
    let growing = examples::session();
    let dir = growing.dir();
    let line = "# The trace goes on.";
    let write = |limit: u64| {
        let whole = xftrace::report::write_graph(dir, limit).expect("a call flow");
        let text = std::fs::read_to_string(dir.join("trace_graph.txt")).expect("text");
        (whole, text)
    };
    let (whole, all) = write(u64::MAX);
    assert!(whole && !all.contains(line), "{all}");
    let calls = all.lines().filter(|line| !line.starts_with('#'));
    let calls: Vec<&str> = calls.collect();
    let size = calls.iter().map(|line| line.len() as u64 + 1).sum::<u64>();
    // Room for all of it is enough, and a byte less than for the last line is not.
    assert_eq!(write(size), (true, all.clone()));
    let last = calls.last().expect("a call").len() as u64 + 1;
    let (whole, cut) = write(size - last);
    assert!(!whole && cut.contains(line), "{cut}");
    let kept = cut.lines().filter(|line| !line.starts_with('#'));
    assert_eq!(kept.count(), calls.len() - 1, "{cut}");
    // Its head is that of the whole trace.
    let head = |text: &str| {
        text.lines()
            .take_while(|line| line.starts_with('#'))
            .count()
    };
    assert_eq!(
        cut.lines().take(head(&all)).collect::<Vec<_>>(),
        all.lines().take(head(&all)).collect::<Vec<_>>()
    );

    let _helper = host.helper_that_wrote_a_part(dir);
    let here = tempfile::tempdir().expect("a directory");
    let output = off(&host, here.path(), "");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{said}");
    let report = format!("`xftrace report {}` writes all", dir.display());
    assert!(
        said.contains(&report) && said.contains("limits.text_size"),
        "{said}"
    );
    let copied = std::fs::read_to_string(here.path().join("trace_graph.txt")).expect("a copy");
    assert_eq!(copied, cut);
}
