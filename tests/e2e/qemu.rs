//! The patched QEMU by itself: which file its memory leaves in a directory, for
//! how long, and what it refuses. No guest runs, so each takes milliseconds.
//! A domain that has it as its `<emulator>` is the row `huge-pages-linked`.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::LazyLock;

use tempfile::TempDir;

const STOCK: &str = "/usr/bin/qemu-system-x86_64";
static PATCHED: LazyLock<PathBuf> = LazyLock::new(|| {
    let built = xftrace_lab::patched_qemu();
    built.expect("the patched QEMU").join("qemu-system-x86_64")
});

/// A directory for memory files.
fn directory() -> TempDir {
    tempfile::tempdir().expect("a directory")
}

/// A QEMU without a machine, but with 4 MiB of memory, listening to its monitor.
/// It is killed where it hangs, and with its parent, which is what is returned.
fn start(qemu: &Path, memory: &Path, options: &str) -> Child {
    let backend = format!(
        "memory-backend-file,id=ram,size=4M,share=on,mem-path={}{options}",
        memory.display()
    );
    Command::new("timeout")
        .args(["--signal=KILL", "60", "setpriv", "--pdeathsig", "KILL"])
        .arg(qemu)
        .args(["-nodefaults", "-display", "none", "-machine", "none", "-S"])
        .args(["-monitor", "stdio", "-object", &backend])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("QEMU")
}

/// A QEMU that runs, with its memory made.
struct Qemu(Child);

impl Qemu {
    fn start(qemu: &Path, memory: &Path, options: &str) -> Qemu {
        let mut qemu = Qemu(start(qemu, memory, options));
        qemu.prompt();
        qemu
    }

    /// Waits until the monitor is ready for another command.
    fn prompt(&mut self) {
        let stdout = self.0.stdout.as_mut().expect("a pipe");
        let mut said = Vec::new();
        while !said.ends_with(b"(qemu) ") {
            let mut byte = [0];
            let read = stdout.read(&mut byte).expect("what the monitor says");
            assert_eq!(read, 1, "ended: {}", String::from_utf8_lossy(&said));
            said.push(byte[0]);
        }
    }

    fn tell(&mut self, command: &str) {
        let stdin = self.0.stdin.as_mut().expect("a pipe");
        writeln!(stdin, "{command}").expect("it listens");
    }

    /// Has it exit, and gives what it said.
    fn quit(mut self) -> String {
        self.tell("quit");
        let output = self.0.wait_with_output().expect("its end");
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stderr).expect("text")
    }
}

/// The mode and the size of a file.
type Kept = (u32, u64);

/// The files in a directory.
fn files(directory: &Path) -> Vec<Kept> {
    let entries = fs::read_dir(directory).expect("a directory");
    let of = |entry: fs::DirEntry| {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        assert!(name.starts_with("qemu_back_mem.ram."), "{name}");
        let meta = entry.metadata().expect("a file");
        (meta.permissions().mode() & 0o7777, meta.len())
    };
    entries.map(|entry| of(entry.expect("an entry"))).collect()
}

#[test]
fn only_where_it_is_asked_for_a_file_stays_until_qemu_exits() {
    let kept = |mode| vec![(mode, 4 << 20)];
    let cases: [(&Path, &str, Vec<Kept>); 6] = [
        (STOCK.as_ref(), "", vec![]),
        (&PATCHED, "", vec![]),
        (&PATCHED, ",retain=off", vec![]),
        (&PATCHED, ",retain=on", kept(0o600)),
        (&PATCHED, ",retain=on,file-mode=0640", kept(0o640)),
        // No umask takes anything away from that.
        (&PATCHED, ",retain=on,file-mode=0777", kept(0o777)),
    ];
    for (qemu, options, wanted) in cases {
        let dir = directory();
        let qemu = Qemu::start(qemu, dir.path(), options);
        assert_eq!(files(dir.path()), wanted, "{options}");
        assert_eq!(qemu.quit(), "", "{options}");
        assert_eq!(files(dir.path()), [], "{options}");
    }
}

#[test]
fn the_file_goes_with_the_backend_and_stays_where_qemu_is_killed() {
    let dir = directory();
    let mut qemu = Qemu::start(&PATCHED, dir.path(), ",retain=on");
    qemu.tell("object_del ram");
    qemu.prompt();
    assert_eq!(files(dir.path()), []);
    qemu.quit();

    let mut qemu = Qemu::start(&PATCHED, dir.path(), ",retain=on");
    qemu.0.kill().expect("it runs");
    // Its pipes are closed then.
    qemu.0.wait_with_output().expect("its end");
    assert_eq!(files(dir.path()).len(), 1);
}

#[test]
fn a_file_that_cannot_be_removed_is_told() {
    let dir = directory();
    let (there, moved) = (dir.path().join("there"), dir.path().join("moved"));
    fs::create_dir(&there).expect("a directory");
    let qemu = Qemu::start(&PATCHED, &there, ",retain=on");
    fs::rename(&there, &moved).expect("a move");
    let said = qemu.quit();
    let warns = "warning: can't remove memory file";
    assert!(said.contains(warns), "{said}");
    assert_eq!(files(&moved).len(), 1);
}

/// What QEMU says of options that it refuses. It leaves no file behind.
fn refused(qemu: &Path, memory: &Path, options: &str) -> String {
    let Output { status, stderr, .. } = start(qemu, memory, options)
        .wait_with_output()
        .expect("its end");
    let said = String::from_utf8(stderr).expect("text");
    assert_eq!(status.code(), Some(1), "{options}: {said}");
    said
}

#[test]
fn what_cannot_be_retained_is_refused_with_the_reason() {
    let dir = directory();
    let here = dir.path();
    let file = directory();
    let file = file.path().join("file");
    fs::write(&file, "").expect("a file");
    let missing = here.join("missing");
    let mode = "'file-mode' must be an octal number of at most 0777 that includes 0600";
    let cases: [(&Path, &str, &str); 16] = [
        (&file, ",retain=on", "needs a directory as 'mem-path'"),
        (&missing, ",retain=on", "needs a directory as 'mem-path'"),
        // Where root may not make a file either.
        (
            "/sys".as_ref(),
            ",retain=on",
            "can't create backing store in /sys for guest RAM: Permission denied",
        ),
        (
            here,
            ",retain=on,readonly=on",
            "'retain' and 'readonly' exclude each other",
        ),
        (here, ",file-mode=0640", "'file-mode' needs 'retain=on'"),
        (here, ",retain=on,file-mode=0477", mode),
        (here, ",retain=on,file-mode=01777", mode),
        (here, ",retain=on,file-mode=nonsense", mode),
        (here, ",retain=on,file-mode=0640x", mode),
        (here, ",retain=on,file-mode=0x1ff", mode),
        (here, ",retain=on,file-mode=-1", mode),
        (here, ",retain=on,file-mode=+0640", mode),
        (here, ",retain=on,file-mode= 0640", mode),
        (here, ",retain=on,file-mode=", mode),
        // It is read before anything asks for the memory.
        (&missing, ",retain=on,file-mode=8", mode),
        // Its file is made by then, and goes.
        (here, ",retain=on,align=3M", "must be"),
    ];
    for (memory, options, says) in cases {
        let said = refused(&PATCHED, memory, options);
        println!("{options}: {said}");
        assert!(said.contains(says), "{options}: {said}");
        assert_eq!(files(here), [], "{options}");
    }
    assert!(file.exists(), "a file that is not its own");
    assert!(refused(STOCK.as_ref(), here, ",retain=on").contains("'retain'"));
}

#[test]
fn the_help_says_what_the_properties_are() {
    let help = Command::new(&*PATCHED)
        .args(["-object", "memory-backend-file,help"])
        .output();
    let help = String::from_utf8(help.expect("QEMU").stdout).expect("text");
    for line in [
        "retain=<bool>",
        "Leave the file that is made in the directory mem-path linked",
        "file-mode=<string>",
        "Access mode of the retained file: an octal number of at most 0777 that includes 0600 \
         (default: 0600)",
    ] {
        assert!(help.contains(line), "{line}: {help}");
    }
}

/// The lines that a series adds to a file, but for what ends a function that could
/// not: those of 7.2 give nothing back.
fn added(series: &str, file: &str) -> Vec<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("qemu-patches")
        .join(series);
    let names = fs::read_to_string(folder.join("series")).expect("a series");
    let mut lines = Vec::new();
    for name in names.lines() {
        let patch = fs::read_to_string(folder.join(name)).expect("a patch");
        let mut here = false;
        for line in patch.lines() {
            if let Some(path) = line.strip_prefix("+++ b/") {
                here = path == file;
            } else if let (true, Some(line)) = (here, line.strip_prefix('+')) {
                lines.push(line.replace("return false;", "return;"));
            }
        }
    }
    lines
}

#[test]
fn both_series_add_the_same_code() {
    const FILE: &str = "backends/hostmem-file.c";
    let (old, new) = (added("7.2", FILE), added("10.0", FILE));
    assert!(old.len() > 100, "{old:#?}");
    let only = |these: &[String], others: &[String]| -> Vec<String> {
        let only = these.iter().filter(|line| !others.contains(line));
        only.map(|line| line.trim().to_owned()).collect()
    };
    // What QEMU itself has changed in between.
    assert_eq!(
        only(&old, &new),
        [
            "#include \"sysemu/sysemu.h\"",
            "g_autofree gchar *name = NULL;",
            "fb->retained_path ?: fb->mem_path,",
            "fb->readonly, errp);",
        ]
    );
    assert_eq!(
        only(&new, &old),
        [
            "#include \"system/system.h\"",
            "fb->retained_path ?: fb->mem_path,",
            "fb->offset, errp);",
        ]
    );
}
