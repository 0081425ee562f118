//! The lab as the tests see it.

use std::ops::Deref;
use std::path::Path;
use std::sync::{LazyLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use xftrace_lab::{Domain, Guest, Lab, Options};

/// How long an xftrace command may take before it counts as hung.
const XFTRACE_TIMEOUT: Duration = Duration::from_secs(60);

/// Where xftrace logs to: nobody listens at the lab's /dev/log.
pub(crate) const LOG_FILE: &str = "/var/log/libvirt/xftrace.log";

/// In the lab's xftrace.toml.
pub(crate) const CONFIG: &str = "\
auto_enroll = [\"by-name-*\"]
log.target = \"/var/log/libvirt/xftrace.log\"
log.level = \"debug\"
paths.baselines = \"/var/lib/libvirt/xftrace-baselines\"
";

/// Started by the first test that asks. A static is never dropped: the lab ends
/// with this process, its owner.
static LAB: LazyLock<Lab> = LazyLock::new(|| {
    Lab::start(&Options {
        xftrace: Some(env!("CARGO_BIN_EXE_xftrace").into()),
        owner: Some(std::process::id()),
        config: CONFIG.to_owned(),
    })
    .unwrap_or_else(|error| panic!("the lab did not start: {error:#}"))
});

/// Who may use the lab: many tests at once, or one that measures.
static TURN: RwLock<()> = RwLock::new(());

/// A domain of one test's own. It is gone when the value is dropped; where
/// that is because the test failed, the guest's console is printed.
pub(crate) struct TestGuest {
    guest: Guest<'static>,
    kernel: String,
    _turn: Turn,
}

/// Held, never read: its drop lets other tests go on.
enum Turn {
    Shared {
        _guard: RwLockReadGuard<'static, ()>,
    },
    Alone {
        _guard: RwLockWriteGuard<'static, ()>,
    },
    /// Another guest of the same test holds it.
    Beside,
}

impl TestGuest {
    /// Defines a domain. Others may run at the same time.
    pub(crate) fn define(domain: &Domain) -> TestGuest {
        let guard = TURN.read().unwrap_or_else(PoisonError::into_inner);
        TestGuest::define_in(domain, Turn::Shared { _guard: guard })
    }

    /// Defines a domain for a test that measures times or loads the machine:
    /// no other test runs beside it.
    pub(crate) fn define_alone(domain: &Domain) -> TestGuest {
        let guard = TURN.write().unwrap_or_else(PoisonError::into_inner);
        TestGuest::define_in(domain, Turn::Alone { _guard: guard })
    }

    /// Defines one more domain for the test whose turn it is, and which keeps
    /// this one at least as long.
    pub(crate) fn beside(&self, domain: &Domain) -> TestGuest {
        TestGuest::define_in(domain, Turn::Beside)
    }

    fn define_in(domain: &Domain, turn: Turn) -> TestGuest {
        let guest = LAB
            .define(domain)
            .unwrap_or_else(|error| panic!("cannot define '{}': {error:#}", domain.name));
        TestGuest {
            guest,
            kernel: domain.kernel.clone(),
            _turn: turn,
        }
    }

    /// The kernel it boots, see [`Domain::kernel`].
    pub(crate) fn kernel(&self) -> &str {
        &self.kernel
    }

    /// Defines a domain by its XML. Others may run at the same time.
    pub(crate) fn define_xml(name: &str, xml: &str) -> TestGuest {
        let guard = TURN.read().unwrap_or_else(PoisonError::into_inner);
        let guest = LAB
            .define_xml(name, xml)
            .unwrap_or_else(|error| panic!("cannot define '{name}': {error:#}"));
        TestGuest {
            guest,
            kernel: String::new(),
            _turn: Turn::Shared { _guard: guard },
        }
    }

    /// What the hook and the helpers of all domains have logged.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(LAB.dir().join("log/xftrace.log")).unwrap_or_default()
    }

    /// The lab it runs in.
    pub(crate) fn lab(&self) -> &'static Lab {
        &LAB
    }

    /// Makes a file in the guest. A command line of the agent's has 4 KiB.
    pub(crate) fn put(&self, path: &str, bytes: &[u8]) {
        let run = |command: &str| self.run(command).unwrap().success().unwrap();
        run(&format!(": >{path}"));
        for part in bytes.chunks(1024) {
            let hex: String = part.iter().map(|byte| format!("{byte:02x}")).collect();
            run(&format!("echo {hex} | xxd -r -p >>{path}"));
        }
    }

    /// Puts a module of a stock kernel into the guest, such as `fs/fat/vfat`. Gives its
    /// path there.
    pub(crate) fn put_module(&self, module: &str) -> String {
        let artifacts = LAB.artifacts(&self.kernel).expect("a kernel");
        let file = artifacts.kernel_dir.join("modules/kernel");
        let file = file.join(format!("{module}.ko.xz"));
        let packed = std::fs::read(&file).unwrap_or_else(|error| panic!("{file:?}: {error}"));
        let name = module.rsplit('/').next().unwrap_or_default();
        let path = format!("/tmp/{name}.ko");
        self.put(&format!("{path}.xz"), &packed);
        let unpack = format!("unxz {path}.xz");
        self.run(&unpack).unwrap().success().unwrap();
        path
    }

    /// Gives the store the kernel that it boots, as `xftrace symbols add` does.
    pub(crate) fn store_kernel(&self) -> StoredKernel {
        let boots = LAB.artifacts(&self.kernel).expect("a kernel").bzimage;
        let mut add = self.xftrace(LAB.dir());
        add.args(["symbols", "add"]).arg(boots);
        let added = add.assert().success().get_output().stdout.clone();
        let added = String::from_utf8(added).expect("text");
        let id = added.split([' ', ':']).nth(1).expect("an id");
        StoredKernel { id: id.to_owned() }
    }

    /// The xftrace command inside the lab, in a directory, within a minute.
    pub(crate) fn xftrace(&self, dir: &Path) -> assert_cmd::Command {
        let command = LAB.xftrace(dir).expect("the lab has an xftrace");
        let mut command = assert_cmd::Command::from_std(command);
        command.timeout(XFTRACE_TIMEOUT);
        command
    }
}

/// A kernel in the store, which is all tests' alike. It is removed when the value
/// is dropped.
pub(crate) struct StoredKernel {
    /// What the store calls it.
    id: String,
}

impl Drop for StoredKernel {
    fn drop(&mut self) {
        let mut remove = LAB.xftrace(LAB.dir()).expect("the lab has an xftrace");
        let _ = remove.args(["symbols", "remove", &self.id]).output();
    }
}

impl Deref for TestGuest {
    type Target = Guest<'static>;

    fn deref(&self) -> &Guest<'static> {
        &self.guest
    }
}

impl Drop for TestGuest {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let console = self.guest.console().unwrap_or_default();
            eprintln!("--- console of '{}':\n{console}---", self.guest.name());
        }
        if let Err(error) = LAB.undefine(self.guest.name()) {
            eprintln!("cannot undefine '{}': {error:#}", self.guest.name());
        }
    }
}
