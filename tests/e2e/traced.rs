//! A guest that is enrolled and runs: what most tests begin with.

use std::ops::Deref;
use std::path::Path;
use std::time::Duration;

use tempfile::TempDir;
use xftrace::session::{self, EndReason, Session, State};
use xftrace_lab::{wait_for, Backing, Domain};

use crate::lab::TestGuest;

/// Longer than a boot takes on a busy machine.
const SOON: Duration = Duration::from_secs(60);

/// A running, enrolled guest, and a directory in which commands are run.
pub(crate) struct Traced {
    guest: TestGuest,
    dir: TempDir,
}

impl Traced {
    /// Defines an ordinary domain, alone in the lab, enrols it and starts it.
    pub(crate) fn start_alone(name: &str) -> Traced {
        Traced::start(TestGuest::define_alone(&Domain {
            backing: Backing::File,
            ..Domain::new(name)
        }))
    }

    /// Enrols a domain that is defined, with the symbols of its kernel,
    /// and starts it.
    pub(crate) fn start(guest: TestGuest) -> Traced {
        Traced::start_with(guest, &[])
    }

    /// The same with more options for `xftrace enroll`.
    pub(crate) fn start_with(guest: TestGuest, options: &[&str]) -> Traced {
        let dir = tempfile::tempdir().expect("a directory");
        let artifacts = guest.lab().artifacts(guest.kernel()).expect("a kernel");
        // Of a stock kernel there is no other file.
        let symbols = [artifacts.system_map, artifacts.bzimage];
        let symbols = symbols.into_iter().find(|file| file.exists());
        guest
            .xftrace(dir.path())
            .args(["enroll", guest.name(), "--symbols"])
            .arg(symbols.expect("a file with its symbols"))
            .args(options)
            .assert()
            .success();
        guest.start().unwrap();
        Traced { guest, dir }
    }

    /// Starts a domain that is enrolled without our doing.
    pub(crate) fn adopt(guest: TestGuest) -> Traced {
        let dir = tempfile::tempdir().expect("a directory");
        guest.start().unwrap();
        Traced { guest, dir }
    }

    /// An xftrace command about this domain, such as `["off", "--no-copy"]`.
    pub(crate) fn command(&self, command: &[&str]) -> assert_cmd::Command {
        let mut xftrace = self.guest.xftrace(self.dir());
        xftrace.args(command).args(["-d", self.guest.name()]);
        xftrace
    }

    /// `xftrace on`, with these functions and options.
    pub(crate) fn on(&self, arguments: &[&str]) {
        self.command(&["on"]).args(arguments).assert().success();
    }

    /// `xftrace on`, for what the domain is enrolled for, as soon as that can be.
    pub(crate) fn on_soon(&self) {
        let on = || {
            let on = self.command(&["on"]).output()?;
            Ok(on.status.success().then_some(()))
        };
        wait_for(SOON, on).unwrap_or_else(|error| panic!("{error:#}: {}", self.log()));
    }

    /// `xftrace off`, and the session that ends with it.
    pub(crate) fn off(&self) -> Session {
        self.command(&["off"]).assert().success();
        let session = self.session();
        assert_eq!(
            (session.meta.state, &session.meta.end),
            (State::Closed, &Some(EndReason::Off))
        );
        session
    }

    /// The domain's newest session.
    pub(crate) fn session(&self) -> Session {
        let sessions = session::list(&self.guest.lab().sessions(self.guest.name()));
        let newest = sessions.first().expect("a session");
        Session::open(newest).expect("a session that can be read")
    }

    /// Where commands are run, and `xftrace off` leaves `trace_graph.txt`.
    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }
}

impl Deref for Traced {
    type Target = TestGuest;

    fn deref(&self) -> &TestGuest {
        &self.guest
    }
}
