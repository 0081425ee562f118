//! Finding the memory of a QEMU that is a directory which looks like its
//! /proc/PID. The process id is this process's own, for the pidfd.

use std::fs;
use std::os::unix::fs::{symlink, MetadataExt};
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};
use nix::unistd::Uid;

use super::*;

const UUID: &str = "9a3f1c50-7f1e-4f0e-8f5e-0123456789ab";
const SIZE: u64 = 1 << 20;

struct Host {
    dir: tempfile::TempDir,
    pid: String,
}

impl Host {
    fn new() -> Host {
        let host = Host {
            dir: tempfile::tempdir().unwrap(),
            pid: std::process::id().to_string(),
        };
        let proc = host.path("proc").join(&host.pid);
        fs::create_dir_all(&proc).unwrap();
        fs::create_dir_all(host.path("run")).unwrap();
        fs::create_dir_all(host.path("ram")).unwrap();
        symlink("/", proc.join("root")).unwrap();
        let stat = "1 (qemu (x) y) S 1 1 1 0 -1 4194560 1 1 0 0 1 1 0 0 20 0 3 0 4711 1 1";
        fs::write(proc.join("stat"), stat).unwrap();
        fs::write(proc.join("status"), "Name:\tqemu\nUid:\t0\t0\t0\t0\n").unwrap();
        host.set_size(SIZE);
        host.set_arguments(&host.arguments("true"));
        host.map(SIZE, "rw-s", "");
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn file(&self) -> PathBuf {
        self.path("ram/pc.ram")
    }

    fn set_size(&self, size: u64) {
        let file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(self.file())
            .unwrap();
        file.set_len(size).unwrap();
    }

    fn arguments(&self, share: &str) -> Vec<String> {
        let object = format!(
            r#"{{"qom-type":"memory-backend-file","id":"pc.ram","mem-path":{:?},"share":{share},"size":{SIZE}}}"#,
            self.file()
        );
        [
            "/usr/bin/qemu-system-x86_64",
            "-machine",
            "pc-q35-7.2,memory-backend=pc.ram",
            "-object",
            &object,
            "-uuid",
            UUID,
        ]
        .map(str::to_owned)
        .to_vec()
    }

    fn set_arguments(&self, arguments: &[String]) {
        let line = arguments.join("\0") + "\0";
        fs::write(self.path("proc").join(&self.pid).join("cmdline"), line).unwrap();
    }

    /// Has the file mapped as it is now.
    fn map(&self, size: u64, permissions: &str, suffix: &str) {
        let file = fs::metadata(self.file()).unwrap();
        let line = format!(
            "7f0000000000-{:x} {permissions} 00000000 {:02x}:{:02x} {}   {}{suffix}\n",
            0x7f00_0000_0000 + size,
            major(file.dev()),
            minor(file.dev()),
            file.ino(),
            self.file().display(),
        );
        fs::write(self.path("proc").join(&self.pid).join("maps"), line).unwrap();
    }

    fn find(&self) -> Result<Backing, MemoryError> {
        self.find_with("")
    }

    /// With these devices in the domain's XML.
    fn find_devices(&self, devices: &str) -> Result<Backing, MemoryError> {
        self.find_with(&format!("<devices>{devices}</devices>"))
    }

    /// With this in the domain's XML.
    fn find_with(&self, more: &str) -> Result<Backing, MemoryError> {
        let domain = DomainXml::parse(&format!(
            "<domain id='1'><name>web1</name><uuid>{UUID}</uuid><memory>1024</memory>{more}\
             </domain>"
        ))
        .unwrap();
        find_in(&self.path("proc"), &domain, &self.path("run"))
    }

    fn error(&self) -> MemoryError {
        self.find().expect_err("found")
    }
}

#[test]
fn finds_and_opens_the_file() {
    let host = Host::new();
    // Others that are not it.
    fs::create_dir_all(host.path("proc/1")).unwrap();
    fs::write(host.path("proc/1/cmdline"), format!("sh\0-uuid\0{UUID}\0")).unwrap();
    fs::create_dir_all(host.path("proc/self")).unwrap();
    fs::create_dir_all(host.path("proc/2")).unwrap();
    fs::write(host.path("proc/2/cmdline"), "qemu\0-uuid\0x\0").unwrap();

    let backing = host.find().unwrap();
    assert_eq!(backing.qemu.pid.to_string(), host.pid);
    assert_eq!(backing.qemu.start_time, 4711);
    assert_eq!(backing.machine.as_deref(), Some("pc-q35-7.2"));
    assert_eq!(backing.modules.len(), 0);
    let [part] = &backing.ram[..] else {
        panic!("{:?}", backing.ram)
    };
    assert_eq!((part.id.as_str(), part.size), ("pc.ram", SIZE));
    assert_eq!(part.address, 0x7f00_0000_0000);
    let Held::File { path, file } = &part.held else {
        panic!("{part:?}")
    };
    assert_eq!(*path, host.file());
    let opened = file.metadata().unwrap();
    assert_eq!(opened.ino(), fs::metadata(host.file()).unwrap().ino());
}

#[test]
fn no_process_is_not_running() {
    let host = Host::new();
    host.set_arguments(&["qemu".to_owned(), "-uuid".to_owned(), "x".to_owned()]);
    let error = host.error();
    assert!(matches!(error, MemoryError::NotRunning { .. }), "{error}");
    assert!(error.to_string().contains("`virsh start web1`"), "{error}");
}

#[test]
fn of_several_processes_the_pid_file_tells_the_right_one() {
    let host = Host::new();
    let mut child = std::process::Command::new("sleep")
        .arg("60")
        .spawn()
        .unwrap();
    let second = host.path("proc").join(child.id().to_string());
    fs::create_dir_all(&second).unwrap();
    for name in ["cmdline", "stat", "status"] {
        fs::copy(
            host.path("proc").join(&host.pid).join(name),
            second.join(name),
        )
        .unwrap();
    }
    let error = host.error();
    assert!(matches!(error, MemoryError::Several { .. }), "{error}");
    fs::write(host.path("run/web1.pid"), format!("{}\n", host.pid)).unwrap();
    assert_eq!(host.find().unwrap().qemu.pid.to_string(), host.pid);

    // A stale PID file leads nowhere, and the one process left is it.
    fs::write(host.path("run/web1.pid"), "1").unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(host.find().unwrap().qemu.pid.to_string(), host.pid);
}

/// Whoever may start a process can give it a QEMU's command line.
#[test]
fn a_process_of_anybody_is_not_taken_for_libvirts() {
    const OTHER: u32 = 4_000_000_000;
    let host = Host::new();
    let owned = |uids: [u32; 4]| {
        let ids = uids.map(|id| id.to_string()).join("\t");
        let status = host.path("proc").join(&host.pid).join("status");
        fs::write(
            status,
            format!("Name:\tqemu\nUid:\t{ids}\nGid:\t0\t0\t0\t0\n"),
        )
        .unwrap();
    };
    let label = format!("<seclabel model='dac'><label>+{OTHER}:+1</label></seclabel>");
    // Of a setuid program too, and of one that gave its rights up.
    for uids in [
        [OTHER; 4],
        [OTHER, 0, 0, 0],
        [0, OTHER, OTHER, 0],
        [0, 0, OTHER, 0],
    ] {
        owned(uids);
        let error = host.error();
        assert!(
            matches!(error, MemoryError::NotRunning { .. }),
            "{uids:?}: {error}"
        );
        host.find_with(&label).unwrap();
    }
    let pid_file = host.path("run/web1.pid");
    // A PID file that is left over, and a process that has the number by now.
    fs::write(&pid_file, &host.pid).unwrap();
    let error = host.error();
    assert!(matches!(error, MemoryError::NotRunning { .. }), "{error}");
    host.find_with(&label).unwrap();
    fs::remove_file(&pid_file).unwrap();

    owned([Uid::effective().as_raw(); 4]);
    let mut child = std::process::Command::new("sleep")
        .arg("60")
        .spawn()
        .unwrap();
    let second = host.path("proc").join(child.id().to_string());
    fs::create_dir_all(&second).unwrap();
    for name in ["cmdline", "stat"] {
        fs::copy(
            host.path("proc").join(&host.pid).join(name),
            second.join(name),
        )
        .unwrap();
    }
    for status in [
        "",
        "Uid:\n",
        "Uid:\tx\t0\t0\t0\n",
        "Uid:\t4000000000\t0\t0\t0\n",
    ] {
        fs::write(second.join("status"), status).unwrap();
        assert_eq!(
            host.find().unwrap().qemu.pid.to_string(),
            host.pid,
            "{status:?}"
        );
    }
    child.kill().unwrap();
    child.wait().unwrap();
}

/// A QEMU whose RAM is the only backend, of this kind, with these mappings.
fn with_backend(kind: &str, maps: &str) -> Host {
    let host = Host::new();
    let mut arguments = host.arguments("true");
    arguments[4] = format!(
        r#"{{"qom-type":"memory-backend-{kind}","id":"pc.ram","share":{},"size":{SIZE}}}"#,
        kind == "memfd"
    );
    host.set_arguments(&arguments);
    fs::write(host.path("proc").join(&host.pid).join("maps"), maps).unwrap();
    host
}

#[test]
fn memory_of_no_file_is_found_by_its_size() {
    let line = |start: u64, size: u64, rest: &str| format!("{start:x}-{:x} {rest}\n", start + size);
    let own = line(0x7f00_0000_0000, SIZE, "rw-p 00000000 00:00 0 ");
    let others = line(0x7f00_0010_0000, 0x1000, "---p 00000000 00:00 0 ")
        + &line(0x7f10_0000_0000, SIZE, "rwxp 00000000 00:00 0 ")
        + &line(0x7f20_0000_0000, SIZE, "rw-p 00000000 00:00 0    [heap]")
        + &line(
            0x7f30_0000_0000,
            SIZE,
            "rw-p 00000000 08:01 7    /usr/lib/x",
        )
        + &line(0x7f40_0000_0000, SIZE / 2, "rw-p 00000000 00:00 0 ");
    let backing = with_backend("ram", &(own.clone() + &others))
        .find()
        .unwrap();
    assert!(matches!(backing.ram[0].held, Held::Anonymous));
    assert_eq!(backing.ram[0].address, 0x7f00_0000_0000);

    let twice = own.clone() + &line(0x7f50_0000_0000, SIZE, "rw-p 00000000 00:00 0 ");
    for (maps, says) in [
        (twice + &others, "2 mappings that could be pc.ram"),
        (
            others,
            "nothing of 1048576 bytes mapped that could be pc.ram",
        ),
    ] {
        let error = with_backend("ram", &maps).error();
        assert!(error.to_string().contains(says), "{error}");
        assert!(
            error.to_string().contains("`xftrace enroll web1`"),
            "{error}"
        );
    }
}

#[test]
fn a_memfd_is_opened_through_its_mapping_and_looked_at() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(SIZE).unwrap();
    let metadata = file.as_file().metadata().unwrap();
    let memfd = |inode: u64, permissions: &str| {
        format!(
            "7f0000000000-7f0000100000 {permissions} 00000000 {:02x}:{:02x} {inode} \
             /memfd:memory-backend-memfd (deleted)\n",
            major(metadata.dev()),
            minor(metadata.dev())
        )
    };
    let with = |maps: &str| {
        let host = with_backend("memfd", maps);
        let links = host.path("proc").join(&host.pid).join("map_files");
        fs::create_dir(&links).unwrap();
        symlink(file.path(), links.join("7f0000000000-7f0000100000")).unwrap();
        host
    };
    let backing = with(&memfd(metadata.ino(), "rw-s")).find().unwrap();
    let Held::File { file: opened, .. } = &backing.ram[0].held else {
        panic!("{backing:?}")
    };
    assert_eq!(opened.metadata().unwrap().ino(), metadata.ino());
    // What the link leads to is not what is mapped.
    let error = with(&memfd(metadata.ino() + 1, "rw-s")).error();
    assert!(matches!(error, MemoryError::NotMapped { .. }), "{error}");
    let error = with(&memfd(metadata.ino(), "rw-p")).error();
    assert!(matches!(error, MemoryError::Missing { .. }), "{error}");
}

#[test]
fn a_file_in_a_directory_is_told_by_its_name() {
    let host = Host::new();
    let mut arguments = host.arguments("true");
    arguments[4] = arguments[4].replace("/pc.ram\"", "\"");
    host.set_arguments(&arguments);
    let made = host.path("ram/qemu_back_mem.pc.ram.AbCdEf");
    fs::rename(host.file(), &made).unwrap();
    let metadata = fs::metadata(&made).unwrap();
    let proc = host.path("proc").join(&host.pid);
    fs::create_dir(proc.join("map_files")).unwrap();
    symlink(&made, proc.join("map_files/7f0000000000-7f0000100000")).unwrap();
    let map = |names: &[&str]| {
        let lines = names.iter().enumerate().map(|(i, name)| {
            let at = 0x7f00_0000_0000 + i as u64 * 0x1000_0000;
            format!(
                "{at:x}-{:x} rw-s 00000000 {:02x}:{:02x} {} {}/{name}\n",
                at + SIZE,
                major(metadata.dev()),
                minor(metadata.dev()),
                metadata.ino() + i as u64,
                host.path("ram").display(),
            )
        });
        fs::write(proc.join("maps"), lines.collect::<String>()).unwrap();
        host.find().map(|backing| backing.ram[0].address)
    };
    // Those of other backends, whose names may end or go on with this one's.
    let others = [
        "qemu_back_mem.memdimm0.AbCdEf (deleted)",
        "qemu_back_mem.my.pc.ram.AbCdEf (deleted)",
        "qemu_back_mem._objects_x_pc.ram.AbCdEf (deleted)",
        "qemu_back_mem.pc.ram.x.AbCdEf",
        "qemu_back_mem.pc.ram",
    ];
    for name in [
        "qemu_back_mem.pc.ram.AbCdEf",
        "qemu_back_mem.pc.ram.AbCdEf (deleted)",
        "qemu_back_mem._objects_pc.ram.AbCdEf (deleted)",
    ] {
        let found = map(&[&[name], &others[..]].concat());
        assert_eq!(found.unwrap(), 0x7f00_0000_0000, "{name}");
        assert!(map(&[name, name]).is_err());
    }
    for name in others {
        let error = map(&[name]).unwrap_err();
        assert!(
            matches!(error, MemoryError::Missing { .. }),
            "{name}: {error}"
        );
    }
}

/// The guest's RAM can be read, and this NVDIMM cannot.
#[test]
fn a_module_that_cannot_be_read_is_left_out_and_told() {
    let host = Host::new();
    let mut arguments = host.arguments("true");
    let image = host.path("ram/nvdimm");
    fs::write(&image, vec![0; SIZE as usize]).unwrap();
    for (option, value) in [
        (
            "-object",
            format!(
                r#"{{"qom-type":"memory-backend-file","id":"memnvdimm0","mem-path":{image:?},"share":false,"size":{SIZE}}}"#
            ),
        ),
        (
            "-device",
            r#"{"driver":"nvdimm","memdev":"memnvdimm0","id":"nvdimm0","slot":0,"addr":4294967296}"#
                .to_owned(),
        ),
    ] {
        arguments.extend([option.to_owned(), value]);
    }
    host.set_arguments(&arguments);
    let module = dimm("nvdimm0", "base='0x100000000'").replace("model='dimm'", "model='nvdimm'");
    let backing = host.find_devices(&module).unwrap();
    assert_eq!((backing.ram.len(), backing.modules.len()), (1, 0));
    let [error] = &backing.left_out[..] else {
        panic!("{:?}", backing.left_out)
    };
    let told = error.to_string();
    assert!(
        told.contains("ram/nvdimm") && told.contains("privately"),
        "{told}"
    );
}

#[test]
fn a_module_whose_place_is_not_known_is_told() {
    let host = Host::new();
    host.set_arguments(&host.arguments("true"));
    let module = dimm("virtiomem0", "").replace("model='dimm'", "model='virtio-mem'");
    let backing = host.find_devices(&module).unwrap();
    assert_eq!((backing.ram.len(), backing.modules.len()), (1, 0));
    let [error] = &backing.left_out[..] else {
        panic!("{:?}", backing.left_out)
    };
    let told = error.to_string();
    assert!(told.contains("virtio-mem 'virtiomem0'"), "{told}");
}

#[test]
fn memory_of_an_unknown_kind_is_refused() {
    let error = with_backend("epc", "").error();
    assert!(matches!(error, MemoryError::UnknownKind { .. }), "{error}");
    assert!(error.to_string().contains("memory-backend-epc"), "{error}");
}

#[test]
fn private_memory_is_refused_whoever_says_so() {
    let host = Host::new();
    host.map(SIZE, "rw-p", "");
    let error = host.error();
    assert!(matches!(error, MemoryError::Private { .. }), "{error}");
    let host = Host::new();
    host.set_arguments(&host.arguments("false"));
    let error = host.error();
    assert!(matches!(error, MemoryError::Private { .. }), "{error}");
}

#[test]
fn an_unlinked_file_is_told_also_where_another_took_its_name() {
    let host = Host::new();
    host.map(SIZE, "rw-s", " (deleted)");
    // Kept, so that the new file cannot get the same inode number.
    fs::rename(host.file(), host.path("ram/kept")).unwrap();
    let error = host.error();
    assert!(
        matches!(error, MemoryError::Unlinked { another: false, .. }),
        "{error}"
    );
    host.set_size(SIZE);
    let error = host.error();
    assert!(
        matches!(error, MemoryError::Unlinked { another: true, .. }),
        "{error}"
    );
}

#[test]
fn a_file_that_is_not_mapped_is_not_handed_out() {
    let host = Host::new();
    host.map(SIZE / 2, "rw-s", "");
    let error = host.error();
    assert!(matches!(error, MemoryError::NotMapped { mapped, .. } if mapped == SIZE / 2));
    fs::rename(host.file(), host.path("ram/kept")).unwrap();
    host.set_size(SIZE);
    let error = host.error();
    assert!(
        matches!(error, MemoryError::NotMapped { mapped: 0, .. }),
        "{error}"
    );
}

#[test]
fn a_truncated_file_names_both_sizes() {
    let host = Host::new();
    host.set_size(SIZE / 4);
    let error = host.error();
    assert!(matches!(error, MemoryError::Truncated { .. }), "{error}");
    let text = error.to_string();
    assert!(
        text.contains("262144") && text.contains("1048576"),
        "{text}"
    );
}

#[test]
fn what_is_no_file_is_not_opened() {
    let host = Host::new();
    fs::remove_file(host.file()).unwrap();
    nix::unistd::mkfifo(&host.file(), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let error = host.error();
    assert!(matches!(error, MemoryError::Io { .. }), "{error}");
    fs::remove_file(host.file()).unwrap();
    symlink("/etc/passwd", host.file()).unwrap();
    assert!(matches!(host.error(), MemoryError::Io { .. }));
}

#[test]
fn the_path_of_the_real_proc_is_searched() {
    let domain = DomainXml::parse(
        "<domain><name>none</name><uuid>00000000-0000-0000-0000-0000000000ff</uuid>\
         <memory>1024</memory></domain>",
    )
    .unwrap();
    let error = find_backing(&domain, Path::new("/nonexistent")).unwrap_err();
    assert!(matches!(error, MemoryError::NotRunning { .. }), "{error}");
}

/// A DIMM as libvirt has it in the XML of a running domain.
fn dimm(alias: &str, base: &str) -> String {
    format!(
        "<memory model='dimm'><target><size unit='MiB'>1</size></target>\
         <alias name='{alias}'/><address type='dimm' slot='0' {base}/></memory>"
    )
}

#[test]
fn a_dimm_that_was_plugged_in_since_is_looked_for_beside_the_rest() {
    let host = Host::new();
    let known = dimm("dimm0", "base='0x100000000'");
    // libvirt says so, and QEMU does not have it mapped.
    fs::write(host.path("ram/dimm0"), [0; SIZE as usize]).unwrap();
    let error = host.find_devices(&known).expect_err("found");
    assert!(matches!(error, MemoryError::NotMapped { .. }), "{error}");

    let maps = host.path("proc").join(&host.pid).join("maps");
    let file = fs::metadata(host.path("ram/dimm0")).unwrap();
    let line = format!(
        "7f1000000000-7f1000100000 rw-s 00000000 {:02x}:{:02x} {}   {}\n",
        major(file.dev()),
        minor(file.dev()),
        file.ino(),
        host.path("ram/dimm0").display(),
    );
    fs::write(&maps, fs::read_to_string(&maps).unwrap() + &line).unwrap();
    let backing = host.find_devices(&known).unwrap();
    let [(part, base)] = &backing.modules[..] else {
        panic!("{backing:?}")
    };
    assert_eq!((part.size, *base), (SIZE, 4 << 30));
    let Held::File { path, file: opened } = &part.held else {
        panic!("{part:?}")
    };
    assert_eq!(*path, host.path("ram/dimm0"));
    assert_eq!(opened.metadata().unwrap().ino(), file.ino());

    // One whose place is not known yet, and one of another kind.
    for devices in [
        dimm("dimm0", ""),
        known.replace("model='dimm'", "model='virtio-mem'"),
    ] {
        assert_eq!(host.find_devices(&devices).unwrap().modules.len(), 0);
    }
}

#[test]
fn a_dimm_of_the_command_line_that_was_taken_out_is_not_looked_for() {
    let host = Host::new();
    let mut arguments = host.arguments("true");
    let object = format!(
        r#"{{"qom-type":"memory-backend-file","id":"memdimm0","mem-path":"/gone","share":true,"size":{SIZE}}}"#
    );
    let device = "pc-dimm,memdev=memdimm0,id=dimm0,slot=0,addr=4294967296";
    for more in ["-object", &object, "-device", device] {
        arguments.push(more.to_owned());
    }
    host.set_arguments(&arguments);
    let is_gone = |devices: &str| {
        let found = host.find_devices(devices);
        matches!(found, Err(MemoryError::Unlinked { .. }))
    };
    assert!(is_gone(&dimm("dimm0", "base='0x100000000'")));
    // QEMU was told where, and libvirt does not say.
    assert!(is_gone(&dimm("dimm0", "")));
    assert_eq!(host.find_with("").unwrap().modules.len(), 0);
}
