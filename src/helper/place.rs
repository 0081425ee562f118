//! Where the guest's kernel lies, noted in the run directory for whoever looks next:
//! a helper that takes over, and `xftrace check`.
//!
//! A kernel does not move. What was found when the guest had just booted is what runs,
//! however many copies of it somebody keeps alive in the guest's memory later. So the
//! place is the host's own knowledge, as long as the QEMU process is the same.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::libvirt::run_dir::RunDir;
use crate::ram::Gpa;
use crate::session::QemuProcess;

/// What the file says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Noted {
    qemu: QemuProcess,
    /// Of `_text`.
    phys_text: u64,
}

/// Notes the place of the kernel that this process's guest runs.
///
/// # Errors
/// Where the run directory cannot be written.
pub(super) fn note(
    run_dir: &RunDir,
    uuid: Uuid,
    qemu: QemuProcess,
    place: Gpa,
) -> anyhow::Result<()> {
    let noted = Noted {
        qemu,
        phys_text: place.0,
    };
    run_dir.save_kernel(uuid, &serde_json::to_vec(&noted)?)?;
    Ok(())
}

/// The place that was noted of this very process's guest.
pub(super) fn noted(run_dir: &RunDir, uuid: Uuid, qemu: QemuProcess) -> Option<Gpa> {
    let noted: Noted = serde_json::from_slice(&run_dir.kernel(uuid)?).ok()?;
    (noted.qemu == qemu).then_some(Gpa(noted.phys_text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_that_of_one_process_and_gone_with_the_domain() {
        let dir = tempfile::tempdir().expect("a directory");
        let (run_dir, uuid) = (RunDir::at(dir.path()), Uuid::from_u128(7));
        let qemu = QemuProcess {
            pid: 4,
            start_time: 9,
        };
        assert_eq!(noted(&run_dir, uuid, qemu), None);
        for place in [Gpa(0x100_0000), Gpa(0x200_0000)] {
            note(&run_dir, uuid, qemu, place).expect("noted");
            assert_eq!(noted(&run_dir, uuid, qemu), Some(place));
        }
        let later = QemuProcess {
            start_time: 10,
            ..qemu
        };
        assert_eq!(noted(&run_dir, uuid, later), None);
        assert_eq!(noted(&run_dir, Uuid::from_u128(8), qemu), None);
        run_dir.save_kernel(uuid, b"{\"qemu\":").expect("saved");
        assert_eq!(noted(&run_dir, uuid, qemu), None);
        note(&run_dir, uuid, qemu, Gpa(1)).expect("noted");
        run_dir.forget(uuid).expect("forgotten");
        assert_eq!(noted(&run_dir, uuid, qemu), None);
    }
}
