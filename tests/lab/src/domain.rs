//! A domain of the lab, and its XML.

use std::path::Path;

use anyhow::{bail, Result};

/// tests/lab/qemu, as tests/lab/libvirtd installs it.
pub(crate) const EMULATOR: &str = "/var/cache/libvirt/lab-qemu";

/// How a domain's memory is backed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Backing {
    /// QEMU's own: no `<memoryBacking>`. What `xftrace enroll` starts from.
    Anon,
    /// A file, shared.
    File,
    /// A file that guest writes never reach.
    Private,
    /// A memfd, shared.
    Memfd,
    /// Huge pages, shared. The machine must have some: [`crate::HugePages`].
    Huge,
    /// The same with the QEMU of tests/lab/qemu-build, which leaves the file
    /// in its directory.
    HugeRetained,
}

/// The kernel that a domain boots where it names none.
pub const KERNEL: &str = "6.1";

/// A domain to define.
#[derive(Debug, Clone, clap::Args)]
pub struct Domain {
    /// Its name.
    pub name: String,
    /// The kernel it boots: 6.1 or 6.12, each with xftrace's patches; Debian's
    /// own, such as stock-6.1-cloud or stock-6.12-generic; or one that is made
    /// to lack something, as tests/lab/kernel-variant names it: 6.1-table,
    /// 6.1-no-btf or 6.1-no-tracer.
    #[arg(long, default_value = KERNEL)]
    pub kernel: String,
    /// QEMU's machine type: pc, q35 or a versioned one.
    #[arg(long, default_value = "pc")]
    pub machine: String,
    /// CPU model: max, or a name libvirt knows; then ",-FEATURE" or ",+FEATURE", as in max,-la57.
    #[arg(long, default_value = "max")]
    pub cpu: String,
    /// Number of CPUs.
    #[arg(long, default_value_t = 2)]
    pub vcpus: u32,
    /// Memory, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 256)]
    pub memory: u64,
    /// NUMA cells that its CPUs and its memory are in, in equal parts; 0 for
    /// no cells at all.
    #[arg(long, default_value_t = 0)]
    pub cells: u32,
    /// Empty slots for memory modules. A machine that has some has a cell.
    #[arg(long, default_value_t = 0)]
    pub slots: u32,
    /// Whether it has a balloon.
    #[arg(long)]
    pub balloon: bool,
    /// How its memory is backed.
    #[arg(long, value_enum, default_value_t = Backing::Anon)]
    pub backing: Backing,
    /// More for the kernel's command line.
    #[arg(long, default_value = "")]
    pub append: String,
    /// XML for the domain's `<metadata>`.
    #[arg(long, default_value = "")]
    pub metadata: String,
}

impl Domain {
    /// A domain with two CPUs, 256 MiB of QEMU's own memory and everything
    /// else as `lab define` has it.
    #[must_use]
    pub fn new(name: &str) -> Domain {
        Domain {
            name: name.to_owned(),
            kernel: KERNEL.to_owned(),
            machine: "pc".to_owned(),
            cpu: "max".to_owned(),
            vcpus: 2,
            memory: 256,
            cells: 0,
            slots: 0,
            balloon: false,
            backing: Backing::Anon,
            append: String::new(),
            metadata: String::new(),
        }
    }

    /// The domain's XML: a kernel and initramfs to boot, the console written
    /// to a file, the agent's port on a socket.
    pub(crate) fn xml(&self, places: &Places) -> Result<String> {
        let accel = match std::env::var("XFTRACE_LAB_ACCEL").as_deref() {
            Ok("kvm") => "kvm",
            Ok("tcg") | Err(_) => "qemu",
            Ok(other) => bail!("XFTRACE_LAB_ACCEL is '{other}': only tcg and kvm are known"),
        };
        let backing = match self.backing {
            Backing::Anon => "",
            Backing::File => "<source type='file'/><access mode='shared'/>",
            Backing::Private => "<source type='file'/><access mode='private'/>",
            Backing::Memfd => "<source type='memfd'/><access mode='shared'/>",
            Backing::Huge | Backing::HugeRetained => "<hugepages/><access mode='shared'/>",
        };
        let backing = match backing {
            "" => String::new(),
            inner => format!("  <memoryBacking>{inner}</memoryBacking>\n"),
        };
        let metadata = match self.metadata.as_str() {
            "" => String::new(),
            inner => format!("  <metadata>{inner}</metadata>\n"),
        };
        Ok(format!(
            "\
<domain type='{accel}'>
  <name>{name}</name>
{metadata}{most}  <memory unit='MiB'>{memory}</memory>
{backing}  <vcpu>{vcpus}</vcpu>
  <os>
    <type arch='x86_64' machine='{machine}'>hvm</type>
    <kernel>{kernel}</kernel>
    <initrd>{initrd}</initrd>
    <cmdline>console=ttyS0 {append}</cmdline>
  </os>
  <features><acpi/><apic/></features>
  {cpu}
  <clock offset='utc'/>
  <on_reboot>restart</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
    <emulator>{emulator}</emulator>
    <controller type='usb' model='none'/>
    <serial type='file'><source path='{console}'/><target port='0'/></serial>
    <serial type='unix'><source mode='bind' path='{agent}'/><target port='1'/></serial>
    <memballoon model='{balloon}'/>
  </devices>
</domain>
",
            name = escape(&self.name),
            emulator = escape(places.emulator),
            most = self.most_memory(),
            memory = self.memory,
            balloon = if self.balloon { "virtio" } else { "none" },
            vcpus = self.vcpus,
            machine = escape(&self.machine),
            append = escape(&self.append),
            cpu = self.cpu_xml()?,
            kernel = escape_path(places.kernel),
            initrd = escape_path(places.initrd),
            console = escape_path(places.console),
            agent = escape_path(places.agent),
        ))
    }

    fn cpu_xml(&self) -> Result<String> {
        let mut parts = self.cpu.split(',');
        let (open, model) = match parts.next() {
            Some("max") => ("<cpu mode='maximum'>", String::new()),
            Some(name) if !name.is_empty() => (
                "<cpu mode='custom' match='exact' check='none'>",
                format!("<model fallback='forbid'>{}</model>", escape(name)),
            ),
            _ => bail!("no CPU model in '{}'", self.cpu),
        };
        let mut xml = format!("{open}{model}");
        for part in parts {
            let (policy, feature) = match (part.strip_prefix('-'), part.strip_prefix('+')) {
                (Some(feature), _) => ("disable", feature),
                (_, Some(feature)) => ("require", feature),
                _ => bail!(
                    "'{part}' of the CPU '{}' is neither -FEATURE nor +FEATURE",
                    self.cpu
                ),
            };
            xml += &format!("<feature policy='{policy}' name='{}'/>", escape(feature));
        }
        Ok(xml + &self.cells_xml()? + "</cpu>")
    }

    /// What its memory may grow to: each slot has room for a GiB.
    fn most_memory(&self) -> String {
        let most = self.memory + (u64::from(self.slots) << 10);
        match self.slots {
            0 => String::new(),
            slots => format!("  <maxMemory slots='{slots}' unit='MiB'>{most}</maxMemory>\n"),
        }
    }

    fn cells_xml(&self) -> Result<String> {
        // libvirt wants a cell where there are slots.
        let cells = self.cells.max(u32::from(self.slots > 0));
        if cells == 0 {
            return Ok(String::new());
        }
        let (cpus, memory) = (self.vcpus / cells, self.memory / u64::from(cells));
        if self.vcpus % cells != 0 || self.memory % u64::from(cells) != 0 {
            bail!(
                "the CPUs and memory of '{}' do not make {cells} equal cells",
                self.name
            );
        }
        let cell = |id| {
            let first = id * cpus;
            let last = first + cpus - 1;
            format!("<cell id='{id}' cpus='{first}-{last}' memory='{memory}' unit='MiB'/>")
        };
        Ok(format!(
            "<numa>{}</numa>",
            (0..cells).map(cell).collect::<String>()
        ))
    }
}

/// The files a domain's XML names.
pub(crate) struct Places<'a> {
    pub(crate) emulator: &'a str,
    pub(crate) kernel: &'a Path,
    pub(crate) initrd: &'a Path,
    pub(crate) console: &'a Path,
    pub(crate) agent: &'a Path,
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('\'', "&apos;")
}

fn escape_path(path: &Path) -> String {
    escape(&path.to_string_lossy())
}
