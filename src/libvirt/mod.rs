//! What xftrace knows of libvirt: domain XML, enrolment, the daemon's
//! connection, hook events, and where QEMU keeps a domain's memory.
//!
//! Only `cli` and `helper` use this room, and only this room uses the `virt`
//! and `quick-xml` crates. Nothing here reads guest memory: [`memory`] finds
//! and opens the files, and hands them out as descriptors.
//!
//! - [`xml`] reads a domain's XML and edits the two places in it that are
//!   ours. Every byte elsewhere stays.
//! - [`connection`] asks the daemon. The hook never does: libvirt waits for
//!   the hook, so that asking would wait for itself.
//! - [`enrolment`] says whether a domain is to be traced, and with what.
//! - [`hook`] decides what a hook event asks for; [`launch`] starts the helper.
//! - [`run_dir`] is where the hook leaves a domain's XML for its helper, and
//!   how one tells whether a helper runs.
//! - [`live`] reads what libvirt writes down of a running domain, for the
//!   changes that no hook is called for.
//! - [`memory`] finds the files that a running QEMU has its guest's RAM in.

pub mod connection;
pub mod enrolment;
pub mod hook;
pub mod launch;
pub mod live;
pub mod memory;
pub mod run_dir;
pub mod xml;

/// A word as a shell takes it, for the commands that messages tell people to
/// type.
pub(crate) fn shell_word(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:@+=,".contains(c);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn commands_in_messages_can_be_pasted() {
        for (word, typed) in [
            ("web-1", "web-1"),
            ("my vm", "'my vm'"),
            ("a'b;c", r"'a'\''b;c'"),
            ("", "''"),
        ] {
            assert_eq!(super::shell_word(word), typed);
        }
    }
}
