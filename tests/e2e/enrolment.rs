//! Enrolment, the hook's decisions and memory files, with domains that have
//! nothing to boot: what the guests do does not matter here.

use std::process::Output;

use crate::lab::TestGuest;

/// Memory that cannot be traced.
const PRIVATE: &str =
    "<memoryBacking><source type='file'/><access mode='private'/></memoryBacking>";

/// Such a domain, defined. `more` goes in after its memory, `devices` to its
/// devices.
fn bare(name: &str, more: &str, devices: &str) -> TestGuest {
    TestGuest::define_xml(name, &xml(name, more, devices))
}

fn xml(name: &str, more: &str, devices: &str) -> String {
    format!(
        "<domain type='qemu'><name>{name}</name><memory unit='MiB'>64</memory>{more}\
         <os><type arch='x86_64' machine='q35'>hvm</type></os><features><acpi/></features>\
         <devices><emulator>/usr/bin/qemu-system-x86_64</emulator>\
         <memballoon model='none'/>{devices}</devices></domain>"
    )
}

impl TestGuest {
    fn run(&self, arguments: &[&str]) -> Output {
        let mut command = self.xftrace("/".as_ref());
        command.args(arguments).output().expect("xftrace runs")
    }

    fn virsh(&self, arguments: &[&str]) -> String {
        self.lab().virsh(arguments).unwrap()
    }

    fn doctor(&self) -> Output {
        self.run(&["doctor", self.name()])
    }
}

fn out(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

const SHARED: &str = "<memoryBacking><source type='file'/><access mode='shared'/></memoryBacking>";

#[test]
fn a_definition_that_went_through_libvirt_comes_back_as_it_was() {
    let graphics = "<graphics type='vnc' port='-1' passwd='secret'/>";
    let cases = [
        ("plain", String::new(), ""),
        ("with a password", String::new(), graphics),
        (
            "described",
            "<title>a &lt; b</title><description>c &amp; d</description>\
             <metadata><o:x xmlns:o='urn:other'><o:y z='1'>text</o:y></o:x></metadata>"
                .to_owned(),
            "",
        ),
        (
            "locked",
            "<memoryBacking><nosharepages/><discard/></memoryBacking>".to_owned(),
            "",
        ),
        (
            "private",
            "<memoryBacking><source type='file'/><access mode='private'/></memoryBacking>"
                .to_owned(),
            "",
        ),
        (
            "anonymous",
            "<memoryBacking><source type='anonymous'/><allocation mode='immediate'/>\
             </memoryBacking>"
                .to_owned(),
            "",
        ),
        ("shared", SHARED.to_owned(), ""),
        (
            "numa",
            "<vcpu>2</vcpu><cpu><numa><cell id='0' cpus='0' memory='32' unit='MiB'/>\
             <cell id='1' cpus='1' memory='32' unit='MiB'/></numa></cpu>"
                .to_owned(),
            "",
        ),
    ];
    for (name, more, devices) in cases {
        let name = format!("xml {name}");
        let domain = bare(&name, &more, devices);
        let dump = || domain.virsh(&["dumpxml", "--inactive", "--security-info", &name]);
        let before = dump();
        let enroll = || {
            let output = domain.run(&["enroll", &name, "-f", "sys_read", "-i", "250ms"]);
            assert_eq!(output.status.code(), Some(0), "{name}: {}", err(&output));
            out(&output)
        };
        assert!(enroll().contains("is enrolled"), "{name}");
        let enrolled = dump();
        for part in [
            "<source type='file'/>",
            "<access mode='shared'/>",
            "functions=\"sys_read\" interval=\"250ms\"",
        ] {
            assert!(enrolled.contains(part), "{name}: {enrolled}");
        }
        assert!(enroll().contains("already"), "{name}");
        assert_eq!(dump(), enrolled, "{name}");
        let output = domain.run(&["unenroll", &name]);
        assert_eq!(output.status.code(), Some(0), "{name}: {}", err(&output));
        assert_eq!(dump(), before, "{name}");
    }
}

#[test]
fn a_required_trace_that_cannot_be_keeps_the_domain_from_starting() {
    let with = |name: &str, required: &str| {
        let metadata = format!(
            "<metadata><x:trace xmlns:x='urn:xftrace:domain:1.0' required='{required}'/>\
             </metadata>{PRIVATE}"
        );
        bare(name, &metadata, "")
    };
    let required = with("required", "yes");
    let refused = required.start_only().unwrap_err().to_string();
    assert!(refused.contains("xftrace enroll required"), "{refused}");
    assert!(!required.is_running().unwrap());

    let desired = with("desired", "no");
    desired.start_only().unwrap();
    let log = desired.log();
    assert!(log.contains("domain 'desired' cannot be traced"), "{log}");
}

#[test]
fn a_domain_that_is_enrolled_by_its_name_and_cannot_be_traced_is_told() {
    let domain = bare("by-name-private", PRIVATE, "");
    domain.start_only().unwrap();
    let log = domain.log();
    let says = "domain 'by-name-private' cannot be traced, though auto_enroll";
    assert!(log.contains(says), "{log}");
    assert!(
        !log.contains("domain 'by-name-private': helper started"),
        "{log}"
    );
}

#[test]
fn the_doctor_knows_every_kind_of_memory() {
    let numa = "<maxMemory slots='2' unit='MiB'>512</maxMemory><vcpu>2</vcpu><cpu><numa>\
                <cell id='0' cpus='0' memory='32' unit='MiB'/>\
                <cell id='1' cpus='1' memory='32' unit='MiB'/></numa></cpu>";
    let dimm = "<memory model='dimm'><target><size unit='MiB'>128</size><node>0</node></target>\
                </memory>";
    let memfd = "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>";
    let cases: [(&str, String, &str, &[&str]); 5] = [
        (
            "memory shared",
            SHARED.to_owned(),
            "",
            &["ok       memory pc.ram is "],
        ),
        (
            "memory numa",
            format!("{SHARED}{numa}"),
            dimm,
            &[
                "ok       memory ram-node0 is ",
                "ok       memory ram-node1 is ",
                "ok       memory memdimm0 is ",
            ],
        ),
        (
            "memory anonymous",
            String::new(),
            "",
            &[
                "ok       memory pc.ram is anonymous memory of QEMU process ",
                "as it runs, its memory is anonymous",
            ],
        ),
        (
            "memory private",
            PRIVATE.to_owned(),
            "",
            &["its memory file is private (access mode='private')"],
        ),
        (
            "memory memfd",
            memfd.to_owned(),
            "",
            &["ok       memory pc.ram is /memfd:memory-backend-memfd (deleted)"],
        ),
    ];
    for (name, more, devices, says) in cases {
        let domain = bare(name, &more, devices);
        domain.start_only().unwrap();
        let output = domain.doctor();
        let doctor = out(&output);
        for part in says {
            assert!(doctor.contains(part), "{name}: {doctor}");
        }
        assert_eq!(output.status.code(), Some(2), "{doctor}");
    }
}

#[test]
fn a_memory_file_that_goes_away_under_the_domain_is_told() {
    let domain = bare("gone", SHARED, "");
    domain.start_only().unwrap();
    let doctor = || out(&domain.doctor());
    let said = doctor();
    let line = said
        .lines()
        .find(|line| line.contains("memory pc.ram is "))
        .unwrap();
    let path = line.split("pc.ram is ").nth(1).unwrap();
    // The memory's directory is the same inside the lab and outside.
    let path = path.split(" (QEMU").next().unwrap();

    // So that it does not touch what is missing, which would end it.
    domain.virsh(&["suspend", "gone"]);
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    file.set_len(32 << 20).unwrap();
    let said = doctor();
    assert!(
        said.contains("was truncated: it has 33554432 bytes"),
        "{said}"
    );
    file.set_len(64 << 20).unwrap();
    assert!(doctor().contains("ok       memory pc.ram is "));
    std::fs::remove_file(path).unwrap();
    let said = doctor();
    assert!(said.contains("was unlinked"), "{said}");
    domain.destroy().unwrap();
}

#[test]
fn commands_refuse_domains_that_cannot_be_traced() {
    let refused = bare("refused", PRIVATE, "");
    let on = || {
        let output = refused.run(&["on", "-d", "refused", "sys_read"]);
        assert_eq!(output.status.code(), Some(2));
        err(&output)
    };
    assert!(on().contains("domain 'refused' is not running: start it with `virsh start refused`"));
    refused.start_only().unwrap();
    assert!(on().contains("is not enrolled: type `xftrace enroll refused`"));
    let enrolled = out(&refused.run(&["enroll", "refused"]));
    assert!(enrolled.contains("virsh shutdown refused"), "{enrolled}");
    // Enrolled for its next start, and not for this one.
    assert!(on().contains("is not enrolled"));
    let output = refused.run(&["on", "-d", "none such", "sys_read"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(
        err(&output).contains("no domain 'none such'"),
        "{}",
        err(&output)
    );

    let metadata = "<metadata><x:trace xmlns:x='urn:xftrace:domain:1.0'/></metadata>";
    for (name, backing, why) in [
        (
            "enrolled memfd",
            "<memoryBacking><source type='memfd'/><access mode='private'/></memoryBacking>",
            "memfd is private",
        ),
        ("enrolled private", PRIVATE, "file is private"),
    ] {
        let domain = bare(name, &format!("{metadata}{backing}"), "");
        domain.start_only().unwrap();
        let output = domain.run(&["on", "-d", name, "sys_read"]);
        let said = err(&output);
        assert_eq!(output.status.code(), Some(2), "{said}");
        let todo = format!("`xftrace enroll '{name}'`");
        assert!(said.contains(why) && said.contains(&todo), "{said}");
        let domain = domain.log();
        assert!(domain.contains(&format!("domain '{name}' cannot be traced")));
    }

    let file = refused.lab().dir().join("transient.xml");
    std::fs::write(&file, xml("transient", "", "")).unwrap();
    refused.virsh(&["create", file.to_str().unwrap()]);
    let output = refused.run(&["enroll", "transient"]);
    refused.virsh(&["destroy", "transient"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(err(&output).contains("is transient"), "{}", err(&output));
}
