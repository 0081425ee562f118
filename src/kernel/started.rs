//! Whether the kernel has started.
//!
//! While it starts, it patches its code, makes what is constant later, and runs code
//! that it throws away afterwards.

use super::btf::Btf;
use super::{Kernel, Symbols};
use crate::ram::GuestRam;

/// Whether the kernel says that it has started (`system_state`, init/main.c), or is
/// past that already. It is the guest's word, so nobody should wait for it for ever.
/// `None` where it cannot be told.
pub(crate) fn has_started(
    ram: &dyn GuestRam,
    kernel: &Kernel,
    symbols: &Symbols,
    btf: &Btf,
) -> Option<bool> {
    let link = symbols.address("system_state");
    let link = link.filter(|&at| kernel.in_image(at))?;
    let state = kernel.read_u32(ram, kernel.runtime(link)).ok()?;
    let running = btf.constant("system_states", "SYSTEM_RUNNING").ok()?;
    Some(state >= running)
}

#[cfg(test)]
mod tests {
    use super::super::btf::build::Builder;
    use super::super::btf::parse::kind;
    use super::super::{Gva, PageTables};
    use super::*;
    use crate::ram::{Gpa, Layout, VecRam};

    const TEXT: u64 = 0xffff_ffff_8020_0000;

    #[test]
    fn a_kernel_has_started_once_it_says_that_it_runs() {
        let ram = VecRam::new(Layout::flat(4 << 20).expect("a layout"));
        ram.poke_u64(Gpa(0x1000 + 8 * 511), 0x2000 | 3);
        ram.poke_u64(Gpa(0x2000 + 8 * 510), 0x3000 | 3);
        ram.poke_u64(Gpa(0x3000 + 8), 1 << 21 | 0x83);
        let kernel = Kernel {
            phys_text: Gpa(0x20_0000),
            slide: 0,
            banner: "Linux version 6.1".to_owned(),
            levels: 4,
            tables: PageTables {
                root: Gpa(0x1000),
                levels: 4,
            },
            link_text: Gva(TEXT),
            span: 0x10_0000,
        };
        let symbols = |name: &str| {
            let state = TEXT + 0x1000;
            let map = format!(
                "{TEXT:x} T _text\n{TEXT:x} T _stext\n{:x} T _etext\n{state:x} D {name}\n",
                TEXT + 0x800
            );
            Symbols::parse(map.into()).expect("symbols")
        };
        let mut btf = Builder::new();
        let names = ["SYSTEM_BOOTING", "SYSTEM_RUNNING"].map(|name| btf.name(name));
        let states = [names[0], 0, names[1], 3];
        btf.add("system_states", kind::ENUM << 24 | 2, 4, &states);
        let btf = btf.parse();
        let started = |symbols: &Symbols| has_started(&ram, &kernel, symbols, &btf);
        let known = symbols("system_state");
        // In order, and past that: halting, suspending.
        for (state, is_so) in [(0, false), (2, false), (3, true), (7, true)] {
            ram.poke(Gpa(0x20_1000), &u32::to_le_bytes(state));
            assert_eq!(started(&known), Some(is_so), "{state}");
        }
        assert_eq!(started(&symbols("other")), None);
        let nothing = Builder::new().parse();
        assert_eq!(has_started(&ram, &kernel, &known, &nothing), None);
    }
}
