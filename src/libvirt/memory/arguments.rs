//! What QEMU's command line says about memory.
//!
//! An option's value is either JSON or `key=value,..` with commas doubled in
//! values (QEMU's manual, "-object"); libvirt writes JSON for `-object` from
//! 6.10 on where QEMU takes it, and the other form elsewhere.

use std::collections::HashMap;

use serde_json::Value;

/// The options about memory.
#[derive(Debug, Default)]
pub(super) struct Arguments {
    machine: Properties,
    /// `-smp`.
    cpus: Properties,
    /// Every `-object` that is memory, by id.
    backends: HashMap<String, Properties>,
    /// The backends of the NUMA nodes, in order.
    nodes: Vec<(u64, String)>,
    /// The backends of memory modules, and the address where one is given.
    modules: Vec<(String, Option<u64>)>,
    /// `-m`, `-mem-path`.
    memory: Properties,
    path: Option<String>,
}

/// One of the objects that the guest's memory is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Backend {
    pub(super) id: String,
    pub(super) kind: Kind,
    pub(super) size: u64,
    pub(super) shared: bool,
}

/// What a backend is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kind {
    /// A file, or a directory that QEMU makes one in.
    File(String),
    /// A memfd.
    Memfd,
    /// Memory of no file.
    Ram,
}

/// How much memory a guest has where QEMU is not told (`default_ram_size`,
/// hw/core/machine.c).
const DEFAULT_SIZE: u64 = 128 * MIB;

const MIB: u64 = 1 << 20;

type Properties = HashMap<String, String>;

/// The key under which a value without one stands.
const BARE: &str = "";

impl Arguments {
    /// Reads a command line. An error says what of it cannot be understood.
    pub(super) fn of(arguments: &[String]) -> Result<Arguments, String> {
        let mut all = Arguments::default();
        for (option, value) in arguments.iter().zip(arguments.iter().skip(1)) {
            // `--object` is the same.
            match option.trim_start_matches('-') {
                _ if !option.starts_with('-') => {}
                "machine" | "M" => all.machine.extend(properties(value)?),
                "object" => all.object(properties(value)?),
                "numa" => all.node(&properties(value)?),
                "device" => all.device(&properties(value)?),
                "m" => all.memory = properties(value)?,
                "smp" => all.cpus = properties(value)?,
                "mem-path" => all.path = Some(value.clone()),
                _ => {}
            }
        }
        all.nodes.sort();
        Ok(all)
    }

    fn object(&mut self, object: Properties) {
        let kind = object.get("qom-type").or_else(|| object.get(BARE));
        if !kind.is_some_and(|kind| kind.starts_with("memory-backend-")) {
            return;
        }
        if let Some(id) = object.get("id") {
            self.backends.insert(id.clone(), object);
        }
    }

    fn node(&mut self, numa: &Properties) {
        let kind = numa.get("type").or_else(|| numa.get(BARE));
        if kind.map(String::as_str) != Some("node") {
            return;
        }
        if let Some(id) = numa.get("memdev") {
            // Without a number, nodes count up.
            let count = self.nodes.len() as u64;
            let number = numa.get("nodeid").and_then(|text| text.parse().ok());
            self.nodes.push((number.unwrap_or(count), id.clone()));
        }
    }

    fn device(&mut self, device: &Properties) {
        let driver = device.get("driver").or_else(|| device.get(BARE));
        // `ivshmem-plain` has a memdev too, which is no RAM, and virtio-pmem is a
        // disk. A virtio device's `addr` is its place on the PCI bus
        // (hw/virtio/virtio-mem.c, hw/mem/pc-dimm.c).
        let key = match driver.map(String::as_str) {
            Some("pc-dimm" | "nvdimm") => "addr",
            Some("virtio-mem" | "virtio-mem-pci") => "memaddr",
            _ => return,
        };
        if let Some(id) = device.get("memdev") {
            let address = device.get(key).and_then(|text| number(text));
            self.modules.push((id.clone(), address));
        }
    }

    /// The machine.
    pub(super) fn machine(&self) -> Option<String> {
        let named = self.machine.get("type").or_else(|| self.machine.get(BARE));
        named.cloned()
    }

    /// How many CPUs the guest can have, those included that may be plugged
    /// in; `None` where QEMU works it out from sockets and cores.
    pub(super) fn max_cpus(&self) -> Option<u32> {
        if self.cpus.is_empty() {
            return Some(1);
        }
        let count = |key| self.cpus.get(key)?.parse().ok();
        count("maxcpus").or_else(|| count("cpus").or_else(|| count(BARE)))
    }

    /// `max-ram-below-4g` of the machine.
    pub(super) fn max_ram_below_4g(&self) -> Option<u64> {
        size(self.machine.get("max-ram-below-4g")?, 1)
    }

    /// What the RAM is made of that the guest boots with. An error says what
    /// cannot be understood.
    pub(super) fn ram(&self) -> Result<Vec<Backend>, String> {
        let main = self.machine.get("memory-backend");
        let ids: Vec<&String> = match main {
            Some(id) => vec![id],
            None => self.nodes.iter().map(|(_, id)| id).collect(),
        };
        if ids.is_empty() {
            return Ok(vec![self.machines_own()?]);
        }
        ids.into_iter().map(|id| self.backend(id)).collect()
    }

    /// Memory without a backend of its own: QEMU makes a private one.
    fn machines_own(&self) -> Result<Backend, String> {
        let told = self.memory.get("size").or_else(|| self.memory.get(BARE));
        let size = match told {
            // Without a suffix, MiB.
            Some(text) => size(text, MIB).ok_or_else(|| format!("-m {text:?} is no size"))?,
            None => DEFAULT_SIZE,
        };
        Ok(Backend {
            id: "the machine's memory".to_owned(),
            kind: self.path.clone().map_or(Kind::Ram, Kind::File),
            size,
            shared: false,
        })
    }

    /// The backends of memory modules, and their addresses where these are
    /// given. Modules of an unknown kind are left out.
    pub(super) fn modules(&self) -> Vec<(Backend, Option<u64>)> {
        let all = self.modules.iter();
        all.filter_map(|(id, address)| Some((self.backend(id).ok()?, *address)))
            .collect()
    }

    /// The backend of a DIMM that libvirt has plugged in since: it is made like
    /// that of the memory which the guest boots with
    /// (qemuBuildMemoryBackendProps, src/qemu/qemu_command.c), a file in the
    /// same directory. As with all of them, it counts only if QEMU has it mapped.
    pub(super) fn plugged(&self, alias: &str, size: u64) -> Option<Backend> {
        let like = self.ram().ok()?.into_iter().next()?;
        let kind = match like.kind {
            Kind::File(path) => Kind::File(match path.strip_suffix(&like.id) {
                Some(dir) => format!("{dir}{alias}"),
                // A directory, in which QEMU makes its files.
                None => path,
            }),
            kind => kind,
        };
        Some(Backend {
            id: format!("mem{alias}"),
            kind,
            size,
            shared: like.shared,
        })
    }

    fn backend(&self, id: &str) -> Result<Backend, String> {
        let object = self
            .backends
            .get(id)
            .ok_or_else(|| format!("{id} has no memory object"))?;
        let named = object.get("qom-type").or_else(|| object.get(BARE));
        let named = named.map_or("nameless object", String::as_str);
        let path = object.get("mem-path");
        // A memfd is shared unless it is told not to be (memfd_backend_instance_init,
        // backends/hostmem-memfd.c), the others the other way round.
        let (kind, shared) = match (named, path) {
            ("memory-backend-file", Some(path)) => (Kind::File(path.clone()), false),
            ("memory-backend-memfd", _) => (Kind::Memfd, true),
            ("memory-backend-ram", _) => (Kind::Ram, false),
            _ => return Err(format!("{id} is a {named}")),
        };
        let text = object
            .get("size")
            .ok_or_else(|| format!("{id} has no size"))?;
        let size = size(text, 1).ok_or_else(|| format!("{id} has {text:?} for a size"))?;
        let told = object.get("share").map(String::as_str);
        Ok(Backend {
            id: id.to_owned(),
            kind,
            size,
            // As qapi_bool_parse does, qapi/qapi-util.c.
            shared: told.map_or(shared, |text| matches!(text, "true" | "yes" | "on" | "y")),
        })
    }
}

/// Reads the value of an option, in either form.
fn properties(text: &str) -> Result<Properties, String> {
    if text.starts_with('{') {
        return json(text);
    }
    let mut all = Properties::new();
    for (place, part) in split_at_commas(text).into_iter().enumerate() {
        match part.split_once('=') {
            Some((key, value)) => all.insert(key.to_owned(), value.to_owned()),
            // The first may be the value of an implied key; any other is a
            // key that is switched on.
            None if place == 0 => all.insert(BARE.to_owned(), part),
            None => all.insert(part, "on".to_owned()),
        };
    }
    Ok(all)
}

/// Splits at single commas; doubled ones stand for one.
fn split_at_commas(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        if c == ',' && rest.next_if_eq(&',').is_none() {
            parts.push(String::new());
        } else if let Some(part) = parts.last_mut() {
            part.push(c);
        }
    }
    parts
}

fn json(text: &str) -> Result<Properties, String> {
    let value: Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let Value::Object(object) = value else {
        return Err("JSON that is no object".to_owned());
    };
    let plain = |value: Value| match value {
        Value::String(text) => Some(text),
        Value::Bool(_) | Value::Number(_) => Some(value.to_string()),
        _ => None,
    };
    let pairs = object.into_iter();
    Ok(pairs
        .filter_map(|(key, value)| Some((key, plain(value)?)))
        .collect())
}

/// A number as QEMU reads it: decimal, or hexadecimal behind `0x`.
fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

/// A size as QEMU reads it (do_strtosz, util/cutils.c): hexadecimal, or decimal
/// with a fraction; with one of the suffixes, and else in units of `unit`.
fn size(text: &str, unit: u64) -> Option<u64> {
    let text = text.trim();
    if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        return u64::from_str_radix(digits, 16).ok()?.checked_mul(unit);
    }
    let at = text.find(|c: char| !matches!(c, '0'..='9' | '.'));
    let (digits, suffix) = text.split_at(at.unwrap_or(text.len()));
    let unit = match suffix.to_ascii_uppercase().as_str() {
        "" => unit,
        "B" => 1,
        "K" => 1 << 10,
        "M" => MIB,
        "G" => 1 << 30,
        "T" => 1 << 40,
        "P" => 1 << 50,
        "E" => 1 << 60,
        _ => return None,
    };
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let whole = whole.parse::<u64>().ok()?.checked_mul(unit)?;
    if fraction.is_empty() {
        return Some(whole);
    }
    // QEMU rounds to the next byte; no memory has a part of one.
    let part: f64 = format!("0.{fraction}").parse().ok()?;
    whole.checked_add((part * unit as f64).round() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn line(text: &[&str]) -> Arguments {
        let all: Vec<String> = text.iter().map(|part| (*part).to_owned()).collect();
        Arguments::of(&all).unwrap()
    }

    fn pc_ram(path: &str, size: u64, shared: bool) -> Backend {
        Backend {
            id: "pc.ram".to_owned(),
            kind: Kind::File(path.to_owned()),
            size,
            shared,
        }
    }

    #[test]
    fn reads_both_forms_of_an_object() {
        let machine = "pc-q35-7.2,usb=off,dump-guest-core=off,memory-backend=pc.ram";
        let json = r#"{"qom-type":"memory-backend-file","id":"pc.ram","mem-path":"/r/a,b/pc.ram","share":true,"x-use-canonical-path-for-ramblock-id":false,"size":536870912}"#;
        let keys = "memory-backend-file,id=pc.ram,mem-path=/r/a,,b/pc.ram,share=yes,size=512M";
        for object in [json, keys] {
            let all = line(&["qemu", "-machine", machine, "-object", object, "-m", "512"]);
            assert_eq!(
                all.ram().unwrap(),
                [pc_ram("/r/a,b/pc.ram", 512 << 20, true)]
            );
            assert_eq!(all.machine().as_deref(), Some("pc-q35-7.2"));
            assert_eq!(all.max_ram_below_4g(), None);
        }
        for (smp, most) in [
            (&[][..], Some(1)),
            (&["-smp", "4"], Some(4)),
            (
                &["-smp", "2,maxcpus=16,sockets=16,cores=1,threads=1"],
                Some(16),
            ),
            (&["-smp", "cpus=3"], Some(3)),
            (&["-smp", "sockets=2,cores=4"], None),
        ] {
            assert_eq!(line(smp).max_cpus(), most, "{smp:?}");
        }
        let private = line(&[
            "-machine",
            "type=pc,memory-backend=pc.ram,max-ram-below-4g=2G",
            "-object",
            "memory-backend-file,id=pc.ram,mem-path=/r,size=1k",
        ]);
        assert_eq!(private.ram().unwrap(), [pc_ram("/r", 1024, false)]);
        assert_eq!(private.machine().as_deref(), Some("pc"));
        assert_eq!(private.max_ram_below_4g(), Some(2 << 30));
    }

    #[test]
    fn takes_nodes_in_their_order_and_modules_apart() {
        let object =
            |id: &str| format!("memory-backend-file,id={id},mem-path=/r/{id},share=yes,size=1M");
        let all = line(&[
            "-object",
            &object("ram-node1"),
            "-numa",
            "node,nodeid=1,cpus=1,memdev=ram-node1",
            "-object",
            &object("ram-node0"),
            "-numa",
            "node,nodeid=0,cpus=0,memdev=ram-node0",
            "-numa",
            "dist,src=0,dst=1,val=20",
            "-object",
            &object("memdimm0"),
            "-device",
            r#"{"driver":"pc-dimm","memdev":"memdimm0","id":"dimm0","slot":0,"addr":4294967296}"#,
            "-object",
            &object("shm"),
            "-device",
            "ivshmem-plain,memdev=shm",
        ]);
        let ids: Vec<String> = all.ram().unwrap().into_iter().map(|ram| ram.id).collect();
        assert_eq!(ids, ["ram-node0", "ram-node1"]);
        let modules = all.modules();
        assert_eq!((modules.len(), modules[0].1), (1, Some(4 << 30)));
        assert_eq!(modules[0].0.id, "memdimm0");
    }

    /// As libvirt 9 writes them: `addr` is a slot of the PCI bus here.
    #[test]
    fn a_virtio_device_is_not_where_its_pci_slot_is() {
        let object =
            |id: &str| format!(r#"{{"qom-type":"memory-backend-ram","id":"{id}","size":1048576}}"#);
        let mut words = Vec::new();
        for (id, device) in [
            (
                "a",
                r#""driver":"virtio-mem-pci","node":0,"block-size":2097152,"requested-size":0,"memaddr":5637144576,"#,
            ),
            (
                "b",
                r#""driver":"virtio-mem-pci","node":0,"block-size":2097152,"requested-size":0,"#,
            ),
            ("c", r#""driver":"virtio-pmem-pci","#),
        ] {
            words.extend(["-object".to_owned(), object(id), "-device".to_owned()]);
            words.push(format!(
                r#"{{{device}"memdev":"{id}","id":"v{id}","bus":"pci.0","addr":"0x6"}}"#
            ));
        }
        let all = Arguments::of(&words).unwrap();
        let found: Vec<(String, Option<u64>)> = all
            .modules()
            .into_iter()
            .map(|(part, at)| (part.id, at))
            .collect();
        let expected = [
            ("a".to_owned(), Some(5_637_144_576)),
            ("b".to_owned(), None),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn tells_the_kinds_of_memory_apart() {
        let machine = "pc,memory-backend=pc.ram";
        let of = |object: &str| line(&["-machine", machine, "-object", object]).ram();
        for (object, kind, shared) in [
            (
                r#"{"qom-type":"memory-backend-ram","id":"pc.ram","size":4096}"#,
                Kind::Ram,
                false,
            ),
            ("memory-backend-memfd,id=pc.ram,size=4k", Kind::Memfd, true),
            (
                "memory-backend-memfd,id=pc.ram,share=off,size=4k",
                Kind::Memfd,
                false,
            ),
        ] {
            let [ram] = &of(object).unwrap()[..] else {
                panic!("{object}");
            };
            assert_eq!((&ram.kind, ram.shared, ram.size), (&kind, shared, 4096));
        }
        for (object, says) in [
            ("memory-backend-epc,id=pc.ram,size=1", "backend-epc"),
            (
                "memory-backend-file,id=other,mem-path=/x,size=1",
                "no memory object",
            ),
            ("memory-backend-file,id=pc.ram,mem-path=/x", "no size"),
        ] {
            let error = of(object).unwrap_err();
            assert!(error.contains(says), "{error}");
        }
        let broken = ["-object".to_owned(), "{\"qom-type\":".to_owned()];
        assert!(Arguments::of(&broken).is_err());
    }

    #[test]
    fn a_machines_own_memory_has_the_size_of_m() {
        let own = |text: &[&str]| line(text).ram().map(|mut all| all.remove(0));
        for (m, bytes) in [("512", 512 << 20), ("size=5G,slots=2,maxmem=8G", 5 << 30)] {
            let ram = own(&["qemu", "-m", m]).unwrap();
            assert_eq!((ram.size, ram.kind, ram.shared), (bytes, Kind::Ram, false));
        }
        assert_eq!(own(&["qemu", "-M", "pc"]).unwrap().size, DEFAULT_SIZE);
        assert!(own(&["qemu", "-m", "some"]).is_err());
        let file = own(&["qemu", "-mem-path", "/r"]).unwrap();
        assert_eq!(file.kind, Kind::File("/r".to_owned()));
    }

    #[test]
    fn sizes_and_switches_are_read_as_qemu_reads_them() {
        for (text, bytes) in [
            ("0", Some(0)),
            ("4096", Some(4096)),
            ("4096B", Some(4096)),
            ("1.5G", Some(3 << 29)),
            ("0.5k", Some(512)),
            ("2.G", Some(2 << 30)),
            ("0x20000000", Some(512 << 20)),
            ("0X1000", Some(4096)),
            ("1t", Some(1 << 40)),
            ("1P", Some(1 << 50)),
            ("15E", Some(15 << 60)),
            ("16E", None),
            ("18446744073709551616", None),
            ("0x10000000000000000", None),
            ("15.99999999999999999999E", None),
            ("1.2.3G", None),
            (".5G", None),
            ("", None),
            ("G", None),
            ("1GB", None),
            ("-1", None),
            ("+1", None),
            ("0xk", None),
            ("1é", None),
        ] {
            assert_eq!(size(text, 1), bytes, "{text:?}");
        }
        assert_eq!(
            (size("512", MIB), size("0x200", MIB)),
            (Some(512 << 20), Some(512 << 20))
        );
        assert_eq!(size("1B", MIB), Some(1));
        let of = |rest: &str| {
            let object = format!("memory-backend-file,id=pc.ram,mem-path=/x{rest}");
            let all = line(&["-machine", "pc,memory-backend=pc.ram", "-object", &object]);
            all.ram().map(|mut all| all.remove(0))
        };
        for (text, shared) in [("y", true), ("on", true), ("n", false), ("off", false)] {
            assert_eq!(
                of(&format!(",size=1M,share={text}")).unwrap().shared,
                shared,
                "{text}"
            );
        }
        assert!(of(",size=1Q").unwrap_err().contains("\"1Q\""));
        assert!(line(&["-m", "1Q"]).ram().unwrap_err().contains("\"1Q\""));
    }

    proptest! {
        #[test]
        fn no_command_line_panics(words in proptest::collection::vec(
            "(-object|-machine|-numa|-device|[a-z{}\",=:é]{0,30})", 0..12,
        )) {
            if let Ok(all) = Arguments::of(&words) {
                let _ = (all.ram(), all.modules(), all.machine(), all.max_ram_below_4g());
            }
        }

        #[test]
        fn no_size_panics(text in "(0x)?[0-9.]{0,25}[a-zA-Zé]{0,2}") {
            let _ = size(&text, MIB);
        }
    }
}
