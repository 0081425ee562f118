//! Which CPUs the guest's kernel has switched off.

use std::collections::BTreeSet;

use crate::ram::{Gpa, GuestRam, RamError};

use super::{Kernel, Symbols};

/// Where a kernel keeps which of its CPUs are online: `__cpu_online_mask`, kernel/cpu.c, a
/// bit each. It is the guest's word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Online(Gpa);

impl Online {
    /// Where `kernel` has it, if its symbols tell.
    pub fn of(kernel: &Kernel, symbols: &Symbols) -> Option<Self> {
        let link = symbols.address("__cpu_online_mask");
        let link = link.filter(|&link| kernel.in_image(link))?;
        Some(Self(kernel.image_gpa(link)))
    }

    /// Which of the first `cpus` CPUs are not online now. `cpus` are no more than the
    /// kernel can have.
    ///
    /// # Errors
    /// If guest memory cannot be read.
    pub fn offline(self, ram: &dyn GuestRam, cpus: u32) -> Result<BTreeSet<u16>, RamError> {
        let cpus = cpus.min(u16::MAX.into()) as u16;
        let mut offline = BTreeSet::new();
        for first in (0..cpus).step_by(64) {
            let word = ram.read_u64(Gpa(self.0 .0.wrapping_add(u64::from(first / 8))))?;
            let of_word = first..cpus.min(first.saturating_add(64));
            offline.extend(of_word.filter(|cpu| word >> (cpu - first) & 1 == 0));
        }
        Ok(offline)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::{Gva, PageTables};
    use crate::ram::{Layout, VecRam};

    #[test]
    fn cpus_that_are_switched_off_are_told() {
        const TEXT: u64 = 0xffff_ffff_8100_0000;
        let ram = VecRam::new(Layout::flat(1 << 20).expect("a layout"));
        let tables = PageTables {
            root: Gpa(0),
            levels: 4,
        };
        let kernel = Kernel::made_up(Gpa(0), Gva(TEXT), 0x1_0000, tables);
        let text = format!(
            "{TEXT:x} T _stext\n{TEXT:x} T _text\n{:x} T _etext\n",
            TEXT + 8
        );
        let symbols = |more: &str| {
            let text = format!("{text}{more}");
            Symbols::parse(text.into_bytes()).expect("symbols")
        };
        assert_eq!(Online::of(&kernel, &symbols("")), None);
        let outside = format!("{:x} D __cpu_online_mask\n", TEXT + 0x1_0000);
        assert_eq!(Online::of(&kernel, &symbols(&outside)), None);
        let mask = format!("{:x} D __cpu_online_mask\n", TEXT + 0x100);
        let online = Online::of(&kernel, &symbols(&mask)).expect("a mask");
        ram.poke_u64(Gpa(0x100), !(1 << 3));
        ram.poke_u64(Gpa(0x108), 0b101);
        let offline = |cpus| online.offline(&ram, cpus).expect("a mask");
        assert_eq!(offline(3), BTreeSet::new());
        assert_eq!(offline(64), BTreeSet::from([3]));
        assert_eq!(offline(67), BTreeSet::from([3, 65]));
    }
}
