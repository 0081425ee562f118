//! Whether the guest's kernel is what it was built as, told from its memory.
//!
//! ```text
//! vmlinuz -image-> what was built ---.
//!                                    |-> text, data: byte by byte
//! guest memory -view-> what is there-'
//!                 `--> owner: whose is it?  -> interrupts, ftrace, kprobes, files, code
//! ```
//!
//! Nothing has to be traced for that, and what is found was there before anybody
//! looked: a hook that is never called is in memory all the same.
//!
//! **What is trusted is a file of the host's**, the vmlinuz that the guest boots:
//! an [`Image`] says what the kernel is before it patches itself, at any slide, and
//! how its structures are laid out. Nothing of what should be is taken from guest
//! memory, with one exception: constants that the kernel computes at boot and writes
//! into its own code are compared with the variables that they are copies of.
//!
//! **A kernel patches itself**, at places that its image lists (`text/sites.rs`), and
//! each of these has few forms that it may take (`text/patched.rs`): another
//! alternative, another branch, a NOP. What a place is in memory must be one of
//! them. Which of them it is hangs on the processor and on what is switched on,
//! and is not judged.
//!
//! **Who is called, and whose is that?** What is registered at run time stands in
//! lists of the guest's. They are followed, each bounded, and every function in them
//! is given an owner (`owner.rs`): the kernel's own text, a module of the list, code
//! that the kernel says it made, or nobody. Only the first is no finding.
//!
//! Uses `kernel` and `ram`; writes nothing.

mod code;
mod data;
mod dispatch;
mod files;
mod finding;
mod ftrace;
mod graph;
mod image;
mod interrupts;
mod its;
mod known;
mod kprobes;
mod lent;
mod owner;
mod proc;
mod steady;
#[cfg(test)]
mod tests;
mod text;
mod tracepoints;
mod trampoline;
mod view;

pub use finding::{Check, Finding, Outcome, Report};
pub use image::{Image, ImageFault};

use std::time::Duration;

use crate::kernel::btf::Btf;
use crate::kernel::{escape, Gva, Kernel, Symbols};
use crate::ram::{GuestRam, RamError};

use kprobes::Probes;
use owner::Owners;
use text::TextReport;
use view::View;

/// The most text that is compared: a distribution's kernel has some 20 MiB.
const MAX_TEXT: u64 = 256 << 20;
/// The longest banner.
const MAX_BANNER: usize = 1024;

/// Why a kernel could not be checked at all.
#[derive(Debug, thiserror::Error)]
pub enum IntegrityError {
    /// The image that it is to be compared with is of no use.
    #[error(transparent)]
    Image(#[from] ImageFault),
    /// It is the image of another kernel.
    #[error(
        "it is another kernel than the one that the guest runs{}; take the vmlinuz that it boots",
        .image.as_ref().map_or_else(String::new, |image| format!(" ({image})"))
    )]
    OtherKernel {
        /// The image's banner, escaped, if it has one where the guest's kernel does.
        image: Option<String>,
    },
    /// Guest memory could not be read.
    #[error(transparent)]
    Ram(#[from] RamError),
}

/// What a guest's kernel is compared with: how it was built. Made once for each
/// kernel, since taking it apart costs more than a check.
#[derive(Debug)]
pub struct Trusted {
    image: Image,
    sites: text::Sites,
    btf: Option<Btf>,
    banner: String,
}

impl Trusted {
    /// Takes the image of `kernel` apart, which `symbols` belong to.
    ///
    /// # Errors
    /// If it is of another kernel, or none that a kernel can be compared with.
    pub fn new(image: Image, kernel: &Kernel, symbols: &Symbols) -> Result<Self, IntegrityError> {
        let at = symbols.address("linux_banner");
        let text = at.and_then(|at| image.up_to(at, MAX_BANNER));
        let line = text.and_then(|text| text.split(|&byte| byte == b'\n' || byte == 0).next());
        let banner = escape(line.unwrap_or_default());
        if banner != kernel.banner {
            let known = banner.starts_with("Linux version ");
            return Err(IntegrityError::OtherKernel {
                image: known.then_some(banner),
            });
        }
        let btf = image
            .section(".BTF")
            .map(|(_, bytes)| Btf::parse(bytes.to_vec()));
        Ok(Self {
            sites: text::Sites::of(&image, symbols)?,
            btf: btf.transpose().ok().flatten(),
            image,
            banner,
        })
    }
}

/// Looks at all that a hook may lie in, once. Of a guest that runs, memory changes
/// meanwhile: see [`check_running`].
///
/// # Errors
/// If nothing can be compared.
pub fn check(
    ram: &dyn GuestRam,
    kernel: &Kernel,
    symbols: &Symbols,
    trusted: &Trusted,
) -> Result<Report, IntegrityError> {
    if trusted.banner != kernel.banner {
        return Err(IntegrityError::OtherKernel {
            image: Some(trusted.banner.clone()),
        });
    }
    let view = View::new(ram, kernel, symbols, trusted.btf.as_ref());
    let owners = Owners::of(&view);
    let mut report = Report::default();
    let probes = Probes::of(&view);
    let text = check_text(&view, trusted, &owners, &probes, &mut report);
    data::constants(&view, &trusted.image, &owners, &mut report);
    data::pointers(&view, &trusted.image, &owners, &mut report);
    interrupts::gates(&view, &owners, &mut report);
    ftrace::callbacks(&view, &owners, text.as_ref(), &mut report);
    kprobes::handlers(&view, &owners, &probes, &mut report);
    tracepoints::attached(&view, &owners, &trusted.image, &mut report);
    files::operations(&view, &owners, &mut report);
    code::unowned(&view, &owners, &mut report);
    // What was zeros because the file vanished is no verdict about the guest.
    ram.check()?;
    Ok(report)
}

/// The same for a guest that runs: where something is found or cannot be told, again
/// a moment later, until two looks agree. Places that never do are a doubt.
/// `wait` waits so long, and says whether to go on; `None` where it was not to.
///
/// # Errors
/// If nothing can be compared.
pub fn check_running(
    ram: &dyn GuestRam,
    kernel: &Kernel,
    symbols: &Symbols,
    trusted: &Trusted,
    wait: &mut dyn FnMut(Duration) -> bool,
) -> Result<Option<Report>, IntegrityError> {
    steady::looks(&mut || check(ram, kernel, symbols, trusted), wait)
}

/// Whether the kernel has started. Until then, what a check finds says nothing. It is the
/// guest's word, and counts as yes where it cannot be told.
pub fn has_started(
    ram: &dyn GuestRam,
    kernel: &Kernel,
    symbols: &Symbols,
    trusted: &Trusted,
) -> bool {
    let btf = trusted.btf.as_ref();
    let says = btf.and_then(|btf| crate::kernel::has_started(ram, kernel, symbols, btf));
    says.unwrap_or(true)
}

/// Compares the kernel's text.
fn check_text(
    view: &View<'_>,
    trusted: &Trusted,
    owners: &Owners,
    probes: &Probes,
    report: &mut Report,
) -> Option<TextReport> {
    let compared = compare_text(view, trusted, owners, probes);
    match &compared {
        Ok(text) => {
            for change in &text.changes {
                let at = view.kernel.runtime(change.at);
                let leads = change.leads_to().map(|to| view.kernel.runtime(to));
                report.add(Finding {
                    check: Check::KernelText,
                    place: view.name(at),
                    address: at.0,
                    expected: data::hex(&change.built),
                    found: data::hex(&change.memory),
                    owner: leads.map(|to| {
                        format!("leads to {}: {}", view.name(to), owners.owner(view, to))
                    }),
                });
            }
            report.not_listed += text.more;
            report.done(Check::KernelText, text.compared, None);
        }
        Err(doubt) => report.done(Check::KernelText, 0, Some(doubt.clone())),
    }
    compared.ok()
}

/// The text without what the kernel's own kprobes put into it. What these say was
/// there before is compared like all else.
fn compare_text(
    view: &View<'_>,
    trusted: &Trusted,
    owners: &Owners,
    probes: &Probes,
) -> Result<TextReport, String> {
    let text = view.symbols.text();
    let length = text.end.0.saturating_sub(text.start.0);
    let room = usize::try_from(length).ok().filter(|_| length <= MAX_TEXT);
    let room =
        room.ok_or_else(|| format!("the kernel's text has {length} bytes by its symbols"))?;
    // By the guest's page tables: what runs is what they lead to.
    let memory = view.bytes(view.kernel.runtime(text.start), room, "the kernel's text");
    let mut memory = memory.map_err(|error| error.to_string())?;
    probes.restore(view, owners, &mut memory);
    text::compare(
        &trusted.image,
        &trusted.sites,
        view.symbols,
        view.kernel.slide,
        &memory,
        &TextGuest { view, owners },
    )
    .map_err(|error| error.to_string())
}

/// What the comparison of the text asks of the guest.
struct TextGuest<'a> {
    view: &'a View<'a>,
    owners: &'a Owners,
}

impl text::Guest for TextGuest<'_> {
    fn variable(&self, link: Gva, width: usize) -> Option<u64> {
        let mut word = [0; 8];
        let bytes = word.get_mut(..width)?;
        let kernel = self.view.kernel;
        let read = kernel.read(self.view.ram, kernel.runtime(link), bytes);
        read.ok()?;
        Some(u64::from_le_bytes(word))
    }

    fn is_thunk(&self, link: Gva, register: u8) -> bool {
        let at = self.view.kernel.runtime(link);
        self.owners.have_thunk(self.view, at, register)
    }

    fn may_lead(&self, call: &str, link: Gva) -> bool {
        let to = self.view.kernel.runtime(link);
        lent::may_lead(self.view, self.owners, call, to)
    }
}
