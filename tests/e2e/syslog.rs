//! What the hook and the helper have to say reaches the system's log, and no
//! guest can fill it.

use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use xftrace::session::FINDINGS_FILE;
use xftrace_lab::{wait_for, Backing, Domain, Lab};

use crate::lab::{TestGuest, CONFIG, LOG_FILE};
use crate::traced::Traced;

const SOON: Duration = Duration::from_secs(30);
/// How often the guest changes a key: more often than is told of in a minute.
const CHANGES: usize = 15;
/// How many findings the helper tells the log of in a minute.
const TOLD: usize = 10;

/// The log daemon of the lab, until it is dropped.
struct Daemon {
    lab: &'static Lab,
    socket: PathBuf,
    heard: Arc<Mutex<Vec<String>>>,
}

impl Daemon {
    /// Listens at the lab's /dev/log, and has xftrace say there what it says.
    fn start(lab: &'static Lab) -> Daemon {
        let socket = lab.dir().join("run/dev-log");
        let daemon = UnixDatagram::bind(&socket).expect("the lab's /dev/log");
        let heard = Arc::new(Mutex::new(Vec::new()));
        let to = Arc::clone(&heard);
        std::thread::spawn(move || {
            let mut message = [0; 8192];
            // An empty one is our own, and the last.
            while let Ok(length @ 1..) = daemon.recv(&mut message) {
                let text = String::from_utf8_lossy(&message[..length]).into_owned();
                to.lock().expect("a list").push(text);
            }
        });
        let more = CONFIG.replace(LOG_FILE, "syslog");
        assert_ne!(more, CONFIG);
        lab.write_config(&more).unwrap();
        Daemon { lab, socket, heard }
    }

    /// The messages of this priority that have these words.
    fn heard(&self, priority: u8, words: &str) -> Vec<String> {
        let heard = self.heard.lock().expect("a list");
        let begin = format!("<{priority}>");
        let told = heard.iter().filter(|text| text.starts_with(&begin));
        told.filter(|text| text.contains(words)).cloned().collect()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- heard: {:#?}", self.heard.lock());
        }
        let _ = self.lab.write_config(CONFIG);
        let _ = UnixDatagram::unbound().and_then(|socket| socket.send_to(&[], &self.socket));
        let _ = std::fs::remove_file(&self.socket);
    }
}

#[test]
fn what_is_said_reaches_the_systems_log_and_a_flood_does_not() {
    let guest = TestGuest::define_alone(&Domain {
        backing: Backing::File,
        ..Domain::new("logged")
    });
    let daemon = Daemon::start(guest.lab());
    let guest = Traced::start(guest);
    // Gone before the guest is: until then no other test begins.
    let daemon = daemon;
    guest.on(&["--interval=10ms", "sys_openat"]);
    // Facility daemon, severity info: RFC 3164, and syslog(3).
    for said in [
        "hook: domain 'logged': helper started as process",
        "attached to domain logged",
    ] {
        let told = daemon.heard(30, said);
        assert!(told.len() == 1 && told[0].contains(" xftrace["), "{told:?}");
    }

    let change = "insmod /lib/modules/xf_key.ko what=now \
        control=0x$(grep -w xftrace_control /proc/kallsyms | cut -d' ' -f1) && rmmod xf_key";
    let flood = format!("for n in $(seq {CHANGES}); do {change} || exit 1; done");
    guest.run(&flood).unwrap().success().unwrap();
    let findings = || {
        let file = guest.session().dir().join(FINDINGS_FILE);
        let text = std::fs::read_to_string(file).unwrap_or_default();
        text.matches("key-changed").count()
    };
    wait_for(SOON, || Ok((findings() >= CHANGES).then_some(()))).unwrap();
    let told = daemon.heard(28, "domain logged: {\"finding\":");
    assert_eq!(told.len(), TOLD, "{told:#?}");
    guest.off();
}
