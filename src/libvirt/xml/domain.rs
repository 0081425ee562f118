//! A domain as its XML describes it, as far as xftrace needs to know.

use uuid::Uuid;

use super::outline::{malformed, Index, Outline, ROOT};
use super::trace::{self, Trace};
use super::XmlError;

/// What xftrace needs to know of a domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DomainXml {
    /// The name. It has no `/` and no control characters, so that it can be
    /// part of a file's name and of a message.
    pub name: String,
    /// The UUID, by which xftrace keys everything: names can change.
    pub uuid: Uuid,
    /// libvirt's number for the running domain; None where it does not run.
    pub id: Option<u32>,
    /// The memory that the domain boots with, in bytes.
    pub memory: u64,
    /// The emulated machine, for instance `pc-q35-7.2`.
    pub machine: Option<String>,
    /// The processor's architecture, for instance `x86_64`.
    pub arch: Option<String>,
    /// Whether libvirt is given the kernel that it boots (`<os><kernel>`).
    pub boots_kernel: bool,
    /// What the memory is made of.
    pub backing: MemoryBacking,
    /// The NUMA cells of the guest, in order; empty where it has none.
    pub numa: Vec<NumaCell>,
    /// The user that QEMU runs as: a name, or `+` and a number. libvirt says it
    /// of a domain that runs, in the label of `<seclabel model='dac'>`.
    pub qemu_user: Option<String>,
    /// Memory modules: DIMMs, NVDIMMs, virtio-mem.
    pub modules: Vec<MemoryDevice>,
    /// What the metadata asks of xftrace; None where the domain is not
    /// enrolled.
    pub trace: Option<Trace>,
}

/// `<memoryBacking>`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MemoryBacking {
    /// `<source type=..>`; None where it is not said, which means anonymous.
    pub source: Option<Source>,
    /// `<access mode=..>`; None where it is not said, which means private.
    pub access: Option<Access>,
    /// Whether `<hugepages>` is there.
    pub hugepages: bool,
    /// Whether `<discard>` is there: QEMU then throws the memory's content
    /// away when the domain ends.
    pub discard: bool,
}

/// Where QEMU takes the memory from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// Memory without a file.
    Anonymous,
    /// A file in libvirt's memory_backing_dir.
    File,
    /// A file without a name.
    Memfd,
    /// Something that this version does not know.
    Other(String),
}

/// Who sees what the guest writes into its memory file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Access {
    /// Everyone who maps it.
    Shared,
    /// QEMU alone: it never reaches the file.
    Private,
    /// Something that this version does not know.
    Other(String),
}

/// One `<cell>` of `<cpu><numa>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NumaCell {
    /// The cell's number where it is given.
    pub id: Option<u32>,
    /// Its memory, in bytes.
    pub memory: u64,
    /// `memAccess`, which goes before the domain's own.
    pub access: Option<Access>,
}

/// One `<memory>` of `<devices>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryDevice {
    /// `dimm`, `nvdimm`, `virtio-mem`, ..
    pub model: String,
    /// Its size, in bytes.
    pub size: u64,
    /// `access`, which goes before the domain's own.
    pub access: Option<Access>,
    /// `<alias name=..>`, which a running domain's modules have.
    pub alias: Option<String>,
    /// Where the guest has it: `<address type='dimm' base=..>`, which libvirt
    /// fills in while the domain runs.
    pub base: Option<u64>,
}

/// The kinds of x86 machine that lay memory out differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MachineFamily {
    /// i440FX: `pc`, `pc-i440fx-*`.
    Pc,
    /// Q35: `q35`, `pc-q35-*`.
    Q35,
    /// Any other.
    Other,
}

impl MachineFamily {
    /// The family of a machine of this name, as QEMU (`-machine`) and libvirt
    /// (`<type machine=..>`) name it.
    pub fn of(machine: &str) -> MachineFamily {
        let is = |bare: &str, versioned: &str| machine == bare || machine.starts_with(versioned);
        if is("pc", "pc-i440fx-") {
            MachineFamily::Pc
        } else if is("q35", "pc-q35-") {
            MachineFamily::Q35
        } else {
            MachineFamily::Other
        }
    }
}

impl DomainXml {
    /// Reads a domain's XML.
    ///
    /// # Errors
    /// Where the text is too large, malformed, or not a domain's.
    pub fn parse(xml: &str) -> Result<DomainXml, XmlError> {
        DomainXml::read(&Outline::of(xml)?)
    }

    /// As [`DomainXml::parse`], of bytes that came from outside.
    ///
    /// # Errors
    /// As there, and where the bytes are not UTF-8.
    pub fn parse_bytes(xml: &[u8]) -> Result<DomainXml, XmlError> {
        let text = std::str::from_utf8(xml)
            .map_err(|error| malformed(error.valid_up_to(), "not UTF-8 text".into()))?;
        DomainXml::parse(text)
    }

    /// The kind of machine; `Other` where the XML names none.
    pub fn family(&self) -> MachineFamily {
        self.machine
            .as_deref()
            .map_or(MachineFamily::Other, MachineFamily::of)
    }

    pub(super) fn read(outline: &Outline<'_>) -> Result<DomainXml, XmlError> {
        let root = outline.get(ROOT);
        if root.name != "domain" {
            return Err(not_a_domain(format!(
                "its outermost element is <{}>",
                root.name.escape_debug()
            )));
        }
        let reader = Reader(outline);
        let os = outline.path(&["os", "type"])?;
        let of_os = |name| os.map_or(Ok(None), |os| outline.attribute(os, name));
        Ok(DomainXml {
            name: reader.name()?,
            uuid: reader.uuid()?,
            id: match outline.attribute(ROOT, "id")? {
                // libvirt writes -1 for a domain that does not run in some
                // versions' metadata of migrations.
                Some(text) => text.parse().ok(),
                None => None,
            },
            memory: reader.memory()?,
            machine: of_os("machine")?,
            arch: of_os("arch")?,
            boots_kernel: outline.path(&["os", "kernel"])?.is_some(),
            backing: reader.backing()?,
            numa: reader.numa()?,
            qemu_user: reader.qemu_user()?,
            modules: reader.modules()?,
            trace: match trace::find(outline)? {
                Some(at) => Some(Trace::read(outline, at)?),
                None => None,
            },
        })
    }
}

struct Reader<'o, 'a>(&'o Outline<'a>);

impl Reader<'_, '_> {
    fn text_of(&self, name: &str) -> Result<String, XmlError> {
        let missing = || not_a_domain(format!("it has no <{name}>"));
        let at = self.0.child(ROOT, name)?.ok_or_else(missing)?;
        let text = self.0.get(at).text.as_deref().unwrap_or_default();
        Ok(text.trim().to_owned())
    }

    fn name(&self) -> Result<String, XmlError> {
        let name = self.text_of("name")?;
        // libvirt itself refuses a slash and a newline; the others would
        // break a file's name or a terminal.
        let bad = name.is_empty()
            || name == "."
            || name == ".."
            || name.contains('/')
            || name.chars().any(char::is_control);
        match bad {
            true => Err(not_a_domain(format!("{name:?} is no name for a domain"))),
            false => Ok(name),
        }
    }

    fn uuid(&self) -> Result<Uuid, XmlError> {
        let text = self.text_of("uuid")?;
        Uuid::try_parse(&text).map_err(|_| not_a_domain(format!("{text:?} is no UUID")))
    }

    fn memory(&self) -> Result<u64, XmlError> {
        match self.0.child(ROOT, "memory")? {
            Some(at) => self.size_of(at),
            None => Err(not_a_domain("it has no <memory>".to_owned())),
        }
    }

    /// The size that an element's text and its attribute `unit` give, in bytes.
    fn size_of(&self, at: Index) -> Result<u64, XmlError> {
        let text = self.0.get(at).text.as_deref().unwrap_or_default().trim();
        let unit = self.0.attribute(at, "unit")?;
        size(text, unit.as_deref())
    }

    fn access(&self, at: Index, name: &str) -> Result<Option<Access>, XmlError> {
        Ok(self.0.attribute(at, name)?.map(|text| match text.as_str() {
            "shared" => Access::Shared,
            "private" => Access::Private,
            _ => Access::Other(text),
        }))
    }

    fn backing(&self) -> Result<MemoryBacking, XmlError> {
        let Some(at) = self.0.child(ROOT, "memoryBacking")? else {
            return Ok(MemoryBacking::default());
        };
        let source = match self.0.child(at, "source")? {
            Some(source) => self.0.attribute(source, "type")?,
            None => None,
        };
        let access = match self.0.child(at, "access")? {
            Some(access) => self.access(access, "mode")?,
            None => None,
        };
        Ok(MemoryBacking {
            source: source.map(|text| match text.as_str() {
                "anonymous" => Source::Anonymous,
                "file" => Source::File,
                "memfd" => Source::Memfd,
                _ => Source::Other(text),
            }),
            access,
            hugepages: self.0.child(at, "hugepages")?.is_some(),
            discard: self.0.child(at, "discard")?.is_some(),
        })
    }

    fn numa(&self) -> Result<Vec<NumaCell>, XmlError> {
        let Some(numa) = self.0.path(&["cpu", "numa"])? else {
            return Ok(Vec::new());
        };
        let cell = |at| {
            let memory = self.0.attribute(at, "memory")?.unwrap_or("0".into());
            let unit = self.0.attribute(at, "unit")?;
            Ok(NumaCell {
                id: self.0.attribute(at, "id")?.and_then(|id| id.parse().ok()),
                memory: size(&memory, unit.as_deref())?,
                access: self.access(at, "memAccess")?,
            })
        };
        self.0.named(numa, "cell").map(cell).collect()
    }

    /// The label is `user:group` (virSecurityDACParseIds, src/security/security_dac.c).
    fn qemu_user(&self) -> Result<Option<String>, XmlError> {
        for at in self.0.named(ROOT, "seclabel") {
            if self.0.attribute(at, "model")?.as_deref() != Some("dac") {
                continue;
            }
            let Some(label) = self.0.child(at, "label")? else {
                continue;
            };
            let text = self.0.get(label).text.as_deref().unwrap_or_default();
            let user = text.trim().split(':').next().unwrap_or_default();
            return Ok(Some(user.to_owned()).filter(|user| !user.is_empty()));
        }
        Ok(None)
    }

    fn modules(&self) -> Result<Vec<MemoryDevice>, XmlError> {
        let Some(devices) = self.0.child(ROOT, "devices")? else {
            return Ok(Vec::new());
        };
        let module = |at| {
            let mut bytes = 0;
            if let Some(target) = self.0.child(at, "target")? {
                if let Some(size) = self.0.child(target, "size")? {
                    bytes = self.size_of(size)?;
                }
            }
            let alias = match self.0.child(at, "alias")? {
                Some(alias) => self.0.attribute(alias, "name")?,
                None => None,
            };
            let base = match self.0.child(at, "address")? {
                Some(address) => self.0.attribute(address, "base")?,
                None => None,
            };
            Ok(MemoryDevice {
                alias,
                base: base.and_then(|text| number(&text)),
                model: self.0.attribute(at, "model")?.unwrap_or_default(),
                size: bytes,
                access: self.access(at, "access")?,
            })
        };
        self.0.named(devices, "memory").map(module).collect()
    }
}

/// Reads a number as libvirt writes addresses: `0x` and hexadecimal digits.
fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

/// Reads a size with libvirt's units: KiB where none is given, powers of 1024
/// but for `KB`, `MB`, .. (virScaleInteger, src/util/virutil.c).
fn size(number: &str, unit: Option<&str>) -> Result<u64, XmlError> {
    let wrong = || not_a_domain(format!("{number:?} {unit:?} is no size of memory"));
    let unit = unit.unwrap_or("KiB").to_ascii_lowercase();
    let scale: u64 = match unit.as_str() {
        "b" | "bytes" | "byte" => 1,
        _ => {
            let (letter, rest) = unit.split_at_checked(1).ok_or_else(wrong)?;
            let power = "kmgtpe".find(letter).ok_or_else(wrong)? as u32 + 1;
            match rest {
                "" | "ib" => 1024u64.pow(power),
                "b" => 1000u64.pow(power),
                _ => return Err(wrong()),
            }
        }
    };
    let number: u64 = number.parse().map_err(|_| wrong())?;
    number.checked_mul(scale).ok_or_else(wrong)
}

fn not_a_domain(what: String) -> XmlError {
    XmlError::NotADomain(what)
}
