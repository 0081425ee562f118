//! A synthetic guest: a few megabytes of RAM with what the finder and the
//! page walk look at, laid out as a real kernel has it. No code runs in it.
//!
//! ```text
//! _text  functions         0x00_0000   16 a page, one page
//!        linux_banner      0x20_0000   and linux_proc_banner
//!        kallsyms tables   0x20_1000
//!        phys_base, ...    0x40_0000
//!        init_task         0x40_1000
//!        page tables       0x40_4000   init_top_pgt first
//!        (free for tests)  0x41_0000   Guest::SPARE, mapped like the image
//! _end                     0x60_0000
//! ```
//!
//! Mapped are the image (2 MiB pages, at its runtime addresses), all of RAM
//! in a direct map (2 MiB pages, from [`DIRECT_MAP`] on), and what a test
//! maps besides with [`Guest::map_page`].

use xftrace::kernel::{find_all, FindError, Gva, Kernel, Symbols};
use xftrace::ram::{Gpa, GuestRam, Layout, VecRam};

/// Link-time address of `_text`, as x86-64 kernels have it.
pub const LINK_TEXT: u64 = 0xffff_ffff_8100_0000;

/// Where all of RAM is mapped.
pub const DIRECT_MAP: u64 = 0xffff_8880_0000_0000;

/// Where [`Guest::map_page`] maps pages, as vmalloc would.
pub const VMALLOC: u64 = 0xffff_c900_0000_0000;

const START_KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
const BANNER_AT: u64 = 0x20_0000;
const KALLSYMS_AT: u64 = 0x20_1000;
const DATA_AT: u64 = 0x40_0000;
const INIT_TASK_AT: u64 = 0x40_1000;
const TABLES_AT: u64 = 0x40_4000;
const SPAN: u64 = 0x60_0000;

/// Present and writable.
const PRESENT: u64 = 0x3;
const LARGE: u64 = 0x80;

/// What a synthetic guest is made from; start from [`Plan::default`].
#[derive(Clone, Debug)]
pub struct Plan {
    /// Bytes of RAM, flat.
    pub ram: u64,
    /// Where the image is loaded, a multiple of 2 MiB.
    pub phys_text: u64,
    /// What KASLR adds, a multiple of 2 MiB.
    pub slide: u64,
    /// 4 or 5.
    pub levels: u8,
    /// Without the newline.
    pub banner: String,
    /// Names and offsets from `_text` of functions, below 2 MiB.
    pub functions: Vec<(String, u64)>,
    /// More symbols with their offsets from `_text`, e.g. in the spare part.
    pub data: Vec<(String, u64)>,
    /// Whether kallsyms offsets below 0 count from the base downwards, as
    /// with CONFIG_KALLSYMS_ABSOLUTE_PERCPU.
    pub absolute_percpu: bool,
}

impl Default for Plan {
    fn default() -> Self {
        let names = [
            "startup_64",
            "vfs_read",
            "__x64_sys_read",
            "__x64_sys_openat",
        ];
        let more = (names.len()..64).map(|i| format!("function_{i}"));
        let names = names.into_iter().map(str::to_owned).chain(more);
        Self {
            ram: 32 << 20,
            phys_text: 0x100_0000,
            slide: 0x1e0_0000,
            levels: 5,
            banner: "Linux version 6.1.0-test (builder@host) (gcc 12.2.0) #1 SMP".into(),
            functions: names.zip((0..).map(|i| i * 0x100)).collect(),
            data: Vec::new(),
            absolute_percpu: true,
        }
    }
}

/// A synthetic guest.
pub struct Guest {
    /// How it was made.
    pub plan: Plan,
    /// Its memory.
    pub ram: VecRam,
    /// The kernel's symbols.
    pub symbols: Symbols,
    /// The next page that is free for a page table.
    next_table: std::cell::Cell<u64>,
}

impl Guest {
    /// Offset from `_text` of the part of the image that tests may use.
    pub const SPARE: u64 = 0x41_0000;

    /// The guest of the default plan.
    pub fn new() -> Self {
        Self::of(Plan::default())
    }

    /// A guest of the given plan, in memory of its own.
    pub fn of(plan: Plan) -> Self {
        let ram = VecRam::new(Layout::flat(plan.ram).expect("a layout"));
        Self::load(plan, ram)
    }

    /// Puts a guest of the given plan into memory that is there (such as
    /// memory with a hook, or with another guest's remains).
    pub fn load(plan: Plan, ram: VecRam) -> Self {
        let guest = Self {
            symbols: Symbols::parse(plan.system_map().into()).expect("a System.map"),
            next_table: plan.phys_text.wrapping_add(TABLES_AT).into(),
            ram,
            plan,
        };
        // A loaded image has no holes.
        (0..SPAN)
            .step_by(4096)
            .for_each(|page| guest.ram.poke(guest.gpa(page), &[0]));
        guest.write_banner();
        guest.write_kallsyms();
        guest.write_data();
        guest
    }

    /// The kernel as the finder sees it.
    pub fn find(&self) -> Result<Vec<Kernel>, FindError> {
        find_all(&self.ram, &self.symbols)
    }

    /// The one kernel in this guest.
    pub fn kernel(&self) -> Kernel {
        self.find()
            .expect("the synthetic guest's kernel is found")
            .remove(0)
    }

    /// Where a part of the image lies, by its offset from `_text`.
    pub fn gpa(&self, offset: u64) -> Gpa {
        Gpa(self.plan.phys_text + offset)
    }

    /// Where the variable of this name lies.
    pub fn gpa_of(&self, symbol: &str) -> Gpa {
        let link = self
            .symbols
            .address(symbol)
            .expect("a symbol of the synthetic kernel");
        self.gpa(link.0 - LINK_TEXT)
    }

    /// The runtime address of a part of the image.
    pub fn runtime(&self, offset: u64) -> Gva {
        Gva(LINK_TEXT + self.plan.slide + offset)
    }

    /// Maps one page of 4 KiB at [`VMALLOC`] + `offset` to `gpa`.
    pub fn map_page(&self, offset: u64, gpa: Gpa) -> Gva {
        let gva = Gva(VMALLOC + offset);
        self.map(gva, gpa, 1);
        gva
    }

    /// Maps the page that a leaf entry of `level` (1: 4 KiB, 2: 2 MiB) stands
    /// for, with the tables on the way there.
    pub fn map(&self, gva: Gva, gpa: Gpa, level: u8) {
        let mut table = self.gpa(TABLES_AT).0;
        for at in (level..=self.plan.levels).rev() {
            let index = gva.0 >> (12 + 9 * (at - 1)) & 0x1ff;
            let entry = Gpa(table + index * 8);
            if at == level {
                let large = if level > 1 { LARGE } else { 0 };
                self.ram.poke_u64(entry, gpa.0 | PRESENT | large);
                return;
            }
            let mut next = self.ram.read_u64(entry).expect("a table in RAM");
            if next == 0 {
                next = self.new_table() | PRESENT;
                self.ram.poke_u64(entry, next);
            }
            table = next & !0xfff;
        }
    }

    fn new_table(&self) -> u64 {
        let table = self.next_table.get();
        assert!(
            table < self.gpa(Self::SPARE).0,
            "no room for another page table"
        );
        self.next_table.set(table + 0x1000);
        table
    }

    fn write_banner(&self) {
        let banner = format!("{}\n\0", self.plan.banner);
        self.ram
            .poke(self.gpa_of("linux_banner"), banner.as_bytes());
        let format = b"%s version %s (builder@host) (gcc 12.2.0) %s\n\0";
        self.ram.poke(self.gpa_of("linux_proc_banner"), format);
    }

    fn write_kallsyms(&self) {
        let base = LINK_TEXT + self.plan.slide;
        self.ram
            .poke_u64(self.gpa_of("kallsyms_relative_base"), base);
        let count = self.plan.functions.len() as u32;
        self.ram.poke_u32(self.gpa_of("kallsyms_num_syms"), count);
        let table = self.gpa_of("kallsyms_offsets");
        for ((_, offset), i) in self.plan.functions.iter().zip(0..) {
            let offset = *offset as i32;
            let entry = if self.plan.absolute_percpu {
                -1 - offset
            } else {
                offset
            };
            self.ram.poke_u32(Gpa(table.0 + i * 4), entry as u32);
        }
    }

    fn write_data(&self) {
        let plan = &self.plan;
        let into = LINK_TEXT + plan.slide - START_KERNEL_MAP;
        self.ram
            .poke_u64(self.gpa_of("phys_base"), plan.phys_text.wrapping_sub(into));
        let five = u32::from(plan.levels == 5);
        self.ram.poke_u32(self.gpa_of("__pgtable_l5_enabled"), five);
        self.ram
            .poke_u64(self.gpa_of("page_offset_base"), DIRECT_MAP);
        self.ram
            .poke(Gpa(self.gpa_of("init_task").0 + 0x5a8), b"swapper/0\0");
        // The root table is there before anything is mapped.
        self.ram.poke_u64(Gpa(self.new_table()), 0);
        for offset in (0..SPAN).step_by(2 << 20) {
            self.map(self.runtime(offset), self.gpa(offset), 2);
        }
        for gpa in (0..plan.ram).step_by(2 << 20) {
            self.map(Gva(DIRECT_MAP + gpa), Gpa(gpa), 2);
        }
    }
}

impl Plan {
    /// The kernel's System.map.
    pub fn system_map(&self) -> String {
        let marks = [
            ("_text", 'T', 0),
            ("_stext", 'T', 0),
            ("_etext", 'T', 0x1f_0000),
            ("linux_banner", 'D', BANNER_AT),
            ("linux_proc_banner", 'D', BANNER_AT + 0x800),
            ("kallsyms_num_syms", 'R', KALLSYMS_AT),
            ("kallsyms_relative_base", 'R', KALLSYMS_AT + 8),
            ("kallsyms_offsets", 'R', KALLSYMS_AT + 16),
            ("phys_base", 'D', DATA_AT),
            ("__pgtable_l5_enabled", 'D', DATA_AT + 8),
            ("page_offset_base", 'D', DATA_AT + 16),
            ("init_task", 'D', INIT_TASK_AT),
            ("init_top_pgt", 'D', TABLES_AT),
            ("_end", 'B', SPAN),
        ];
        let marks = marks
            .into_iter()
            .map(|(name, kind, at)| (name.to_owned(), kind, at));
        let of = |kind| move |(name, at): &(String, u64)| (name.clone(), kind, *at);
        let functions = self.functions.iter().map(of('T'));
        let data = self.data.iter().map(of('D'));
        marks
            .chain(functions)
            .chain(data)
            .map(|(name, kind, at)| format!("{:016x} {kind} {name}\n", LINK_TEXT + at))
            .collect()
    }
}
