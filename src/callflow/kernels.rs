//! [`Names`] from symbol files: each boot with its kernel's symbols and slide; and,
//! of modules that these do not know, from what the guest says.

use std::cell::RefCell;
use std::ops::Range;

use super::names::{Kind, Name, Names};
use crate::kernel::{Gva, Symbols};
use crate::session::{GuestName, ModuleNames, ModulesReader, Session, SessionError};

/// Where x86-64 loads modules, with and without RANDOMIZE_BASE: MODULES_VADDR
/// and MODULES_END (arch/x86/include/asm/pgtable_64_types.h). The kernel's own
/// image may lie in the lower part.
const MODULES: Range<u64> = 0xffff_ffff_a000_0000..0xffff_ffff_ff00_0000;

/// The kernels of a guest's boots. More can be added while it is in use, for
/// who follows a guest that may boot again.
#[derive(Debug, Default)]
pub struct Kernels<'a> {
    boots: RefCell<Vec<(u32, Running<'a>)>>,
    modules: ModuleNames,
}

/// A kernel as it ran in one boot.
#[derive(Clone, Copy, Debug)]
struct Running<'a> {
    symbols: &'a Symbols,
    /// Run-time minus link-time addresses, wrapping.
    slide: u64,
    /// The link-time addresses of the image: `_text` to `_end`.
    image: (u64, u64),
}

impl<'a> Kernels<'a> {
    /// For each boot: its number, the symbols of its kernel, and its slide
    /// (run-time minus link-time address, wrapping).
    pub fn new(boots: impl IntoIterator<Item = (u32, &'a Symbols, u64)>) -> Self {
        let kernels = Self::default();
        for (boot, symbols, slide) in boots {
            kernels.add(boot, symbols, slide);
        }
        kernels
    }

    /// Adds a boot.
    pub fn add(&self, boot: u32, symbols: &'a Symbols, slide: u64) {
        let bound = |name, otherwise: Gva| symbols.address(name).unwrap_or(otherwise).0;
        let text = symbols.text();
        let image = (bound("_text", text.start), bound("_end", text.end));
        let running = Running {
            symbols,
            slide,
            image,
        };
        self.boots.borrow_mut().push((boot, running));
    }

    /// What the guest says of its modules, for more to be added as it comes.
    pub fn modules(&self) -> &ModuleNames {
        &self.modules
    }

    /// Those of a session, with the modules that it has by now.
    ///
    /// # Errors
    /// If the symbols of one, or what the guest said of its modules, cannot be read.
    pub fn of(session: &'a Session) -> Result<Self, SessionError> {
        let kernels = Self::default();
        for boot in &session.meta.boots {
            kernels.add(boot.number, session.symbols(boot)?, boot.slide);
        }
        ModulesReader::new(session.dir()).read_on(&kernels.modules)?;
        Ok(kernels)
    }
}

impl Names for Kernels<'_> {
    fn function(&self, boot: u32, runtime: Gva) -> Name<'_> {
        let boots = self.boots.borrow();
        let known = boots.iter().find(|(number, _)| *number == boot).copied();
        drop(boots);
        let outside = if MODULES.contains(&runtime.0) {
            Kind::Module
        } else {
            Kind::Outside
        };
        let nothing = Name {
            symbol: None,
            module: None,
            kind: outside,
            irq_entry: false,
            told: None,
        };
        let Some((_, kernel)) = known else {
            return nothing;
        };

        let link = Gva(runtime.0.wrapping_sub(kernel.slide));
        let symbols = kernel.symbols;
        let is_text = symbols.text().contains(&link) || symbols.init_text().contains(&link);
        let symbol = symbols.lookup(link);
        if symbol.is_some() || is_text {
            // What irqentry_exit calls on the way out of an interrupt belongs to
            // it as well, though irqentry_exit serves faults too.
            let is_exit = symbol.is_some_and(|(name, _)| name.starts_with("irqentry_"));
            let irq_entry = symbols.in_irq_entry(link) || is_exit;
            return Name {
                symbol,
                kind: Kind::Kernel,
                irq_entry,
                ..nothing
            };
        }
        if (kernel.image.0..kernel.image.1).contains(&link.0) {
            return Name {
                kind: Kind::Outside,
                ..nothing
            };
        }
        match symbols.lookup_module(runtime, kernel.slide) {
            Some(found) => Name {
                symbol: Some((found.name, found.offset)),
                module: Some(found.module),
                ..nothing
            },
            None => nothing,
        }
    }

    fn told(&self, boot: u32, runtime: Gva, time: u64) -> Option<GuestName<'_>> {
        self.modules.told(boot, runtime, time)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAP: &str = "\
ffffffff81000000 T _text
ffffffff81000000 T _stext
ffffffff81000040 T vfs_read
ffffffff81000800 T sysvec_apic_timer_interrupt
ffffffff81000900 T irqentry_exit
ffffffff81001000 T _etext
ffffffff81002000 D data
ffffffff81003000 B _end
ffffffffc0000000 t ext4_read\t[ext4]
";

    fn symbols() -> Symbols {
        Symbols::parse(MAP.into()).expect("a symbol file")
    }

    #[test]
    fn each_boot_has_its_slide() {
        let symbols = symbols();
        let kernels = Kernels::new([(1, &symbols, 0), (2, &symbols, 0x1000_0000)]);
        let name = |boot, at: u64| kernels.function(boot, Gva(at)).symbol;
        assert_eq!(name(1, 0xffff_ffff_8100_0044), Some(("vfs_read", 4)));
        assert_eq!(name(2, 0xffff_ffff_9100_0044), Some(("vfs_read", 4)));
        assert_eq!(name(2, 0xffff_ffff_8100_0044), None);
        assert_eq!(name(3, 0xffff_ffff_8100_0044), None);
    }

    #[test]
    fn addresses_are_told_apart_by_area() {
        let symbols = symbols();
        // The slide puts the image into what is the module area without KASLR.
        let kernels = Kernels::new([(1, &symbols, 0x2000_0000)]);
        let name = |at: u64| kernels.function(1, Gva(at));
        assert_eq!(name(0xffff_ffff_a100_0100).kind, Kind::Kernel);
        // Text without a symbol, data, and the gap behind the text.
        assert_eq!(name(0xffff_ffff_a100_0000).kind, Kind::Kernel);
        assert_eq!(name(0xffff_ffff_a100_2000).kind, Kind::Outside);
        assert_eq!(name(0xffff_ffff_a100_2000).symbol, None);
        assert_eq!(name(0xffff_ffff_a100_1800).kind, Kind::Outside);
        assert_eq!(name(0xffff_ffff_a200_0000).kind, Kind::Module);
        assert_eq!(name(0xffff_8880_0000_0000).kind, Kind::Outside);
        assert_eq!(name(u64::MAX).kind, Kind::Outside);
        let module = name(0xffff_ffff_c000_0010);
        assert_eq!((module.kind, module.module), (Kind::Module, Some("ext4")));
        assert_eq!(module.symbol, Some(("ext4_read", 0x10)));
    }

    #[test]
    fn interrupts_enter_and_leave_through_their_entry_code() {
        let symbols = symbols();
        let kernels = Kernels::new([(1, &symbols, 0)]);
        let irq = |at: u64| kernels.function(1, Gva(at)).irq_entry;
        assert!(irq(0xffff_ffff_8100_0839) && irq(0xffff_ffff_8100_0910));
        assert!(!irq(0xffff_ffff_8100_0040) && !irq(0xffff_8880_0000_0000));
    }
}
