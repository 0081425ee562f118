//! Kprobes and kretprobes: functions that are called where an instruction of the
//! kernel's is run, and where functions return.
//!
//! ```text
//! kprobe_table -> kprobe -> pre_handler, post_handler
//!                 (several at one place: aggr_pre_handler, and a list of them)
//! ```
//!
//! The kernel's own tracers use them (perf, tracefs, BPF through them), and then the
//! function is the kernel's: that is noted, but for a BPF program, which cannot be
//! told from a hook. A function of a module, or of nobody, is found.
//!
//! A kprobe where Ftrace cannot call changes the kernel's text: a breakpoint, or a
//! jump to code that was made for it. Where all handlers are the kernel's own, and what
//! runs in place of the instructions does the same ([`moved`]), what the kprobe has kept
//! of the text is put back before that is compared ([`Probes::restore`]). So nothing is
//! believed that is not in the image.

mod lengths;
mod moved;

use moved::{Detour, DetourAt, Moved, MovedAt, LONGEST};

use std::collections::BTreeMap;

use super::dispatch;
use super::finding::{Check, Finding, Report};
use super::known::{self, Role};
use super::owner::{Owner, Owners};
use super::text::{jump, INT3, JUMP};
use super::view::{go_on, Obstacle, View, MAX_ENTRIES};
use crate::kernel::Gva;

/// `KPROBE_TABLE_SIZE`, kernel/kprobes.c.
const BUCKETS: u64 = 64;
const WHAT: &str = "a kprobe";
/// `KPROBE_FLAG_OPTIMIZED`, include/linux/kprobes.h: it is an `optimized_kprobe`.
const OPTIMIZED: u32 = 4;
/// The most that a kprobe takes the place of: a jump of five bytes that ends in the
/// first one of an instruction.
const MOST: usize = 4 + LONGEST;

/// How much text is taken apart for all of them, bytes: some thousand functions.
const MAX_DECODED: usize = 4 << 20;

/// A kprobe or a kretprobe.
#[derive(Debug)]
struct Probe {
    /// Where its `struct kprobe` is.
    kprobe: Gva,
    is_return: bool,
    /// The functions that it calls.
    handlers: Vec<Gva>,
    /// Those that are called where functions return, and are none of its own.
    astray: Vec<Gva>,
}

/// A place that is probed.
#[derive(Debug)]
pub(super) struct Place {
    at: Gva,
    /// The probe in the table, and those that it stands for.
    probes: Vec<Probe>,
    /// What it took out of the text, where that and all probes can be read.
    taken: Option<Taken>,
}

/// What a kprobe took out of the text.
#[derive(Debug)]
struct Taken {
    /// What the text has in place of the breakpoint, or of the jump's first byte.
    opcode: u8,
    /// What runs in place of the instruction under a breakpoint,
    moved: Moved,
    /// and of those under a jump.
    detour: Option<Detour>,
}

/// Where things are in `struct kprobe` and `struct kretprobe`.
struct Offsets {
    hlist: u64,
    list: u32,
    addr: u64,
    opcode: u64,
    flags: u64,
    handlers: [u64; 2],
    /// Of a kretprobe, from its kprobe on.
    returns: [u64; 2],
    /// Where it has its `struct rethook`, if the kernel has such.
    rethook: Option<u64>,
    moved: MovedAt,
    detour: Option<DetourAt>,
}

impl Offsets {
    fn of(view: &View<'_>) -> Result<Self, Obstacle> {
        let btf = view.btf()?;
        let (kprobe, kretprobe) = (btf.structure("kprobe")?, btf.structure("kretprobe")?);
        let field = |name| kprobe.field(name).map(|field| u64::from(field.offset));
        let inner = kretprobe.field("kp")?.offset;
        let after = |name| {
            let field = kretprobe.field(name)?;
            Ok::<_, Obstacle>(u64::from(field.offset.saturating_sub(inner)))
        };
        // A kernel may be built without.
        let optimized = btf.structure("optimized_kprobe").ok();
        Ok(Self {
            hlist: field("hlist")?,
            list: kprobe.field("list")?.offset,
            addr: field("addr")?,
            opcode: field("opcode")?,
            flags: field("flags")?,
            handlers: [field("pre_handler")?, field("post_handler")?],
            returns: [after("handler")?, after("entry_handler")?],
            rethook: after("rh").ok(),
            moved: MovedAt::of(&kprobe)?,
            detour: optimized.as_ref().map(DetourAt::of).transpose()?,
        })
    }
}

/// All places that are probed, as far as they can be listed.
#[derive(Debug, Default)]
pub(super) struct Probes {
    pub(super) places: Vec<Place>,
    /// How many entries were looked at.
    entries: usize,
    doubt: Option<String>,
}

impl Probes {
    /// Reads `kprobe_table`, which is not there in a kernel that is built without.
    pub(super) fn of(view: &View<'_>) -> Self {
        let mut probes = Self::default();
        if view.symbols.address("kprobe_table").is_some() {
            if let Err(error) = table(view, &mut probes) {
                probes.doubt = Some(error.to_string());
            }
        }
        probes
    }
}

const TABLE: &str = "the table of kprobes";

fn table(view: &View<'_>, probes: &mut Probes) -> Result<(), Obstacle> {
    let offsets = Offsets::of(view)?;
    let table = view.address("kprobe_table")?;
    for bucket in 0..BUCKETS {
        let done = in_bucket(view, &offsets, table.wrapping_add(8 * bucket), probes);
        go_on(done, &mut |doubt| probes.doubt = Some(doubt))?;
    }
    Ok(())
}

/// The kernel finds a kprobe by its bucket, whatever is wrong with the others.
fn in_bucket(
    view: &View<'_>,
    offsets: &Offsets,
    bucket: Gva,
    probes: &mut Probes,
) -> Result<(), Obstacle> {
    let mut node = view.pointer(bucket, TABLE)?;
    while node.0 != 0 {
        let kprobe = Gva(node.0.wrapping_sub(offsets.hlist));
        let place = place(view, offsets, kprobe, probes)?;
        probes.places.extend(place);
        node = view.pointer(node, TABLE)?;
    }
    Ok(())
}

/// What an entry of the table is of, as far as it can be read; `None` where not even its
/// address can.
fn place(
    view: &View<'_>,
    offsets: &Offsets,
    kprobe: Gva,
    probes: &mut Probes,
) -> Result<Option<Place>, Obstacle> {
    let Probes { doubt, entries, .. } = probes;
    let mut is_whole = true;
    let mut doubt = |text| {
        is_whole = false;
        *doubt = Some(text);
    };
    let at = view.pointer(kprobe.wrapping_add(offsets.addr), WHAT);
    let Some(at) = go_on(at.map(Some), &mut doubt)? else {
        return Ok(None);
    };
    let mut all = vec![kprobe];
    let others = kprobe.wrapping_add(offsets.list.into());
    let list = "the list of kprobes at one place";
    go_on(
        view.list_into(others, offsets.list, list, &mut all),
        &mut doubt,
    )?;
    let mut probes = Vec::new();
    for one in all {
        *entries += 1;
        if *entries > MAX_ENTRIES {
            return Err(Obstacle::Endless(TABLE));
        }
        let probe = probe(view, offsets, one, &mut doubt);
        probes.extend(go_on(probe.map(Some), &mut doubt)?);
    }
    let taken = Taken::read(view, offsets, kprobe);
    let taken = go_on(taken.map(Some), &mut doubt)?;
    Ok(Some(Place {
        at,
        probes,
        taken: taken.filter(|_| is_whole),
    }))
}

impl Taken {
    fn read(view: &View<'_>, offsets: &Offsets, kprobe: Gva) -> Result<Self, Obstacle> {
        let flags = view.half(kprobe.wrapping_add(offsets.flags), WHAT)?;
        let detour = offsets.detour.as_ref().filter(|_| flags & OPTIMIZED != 0);
        let [opcode] = view.array(kprobe.wrapping_add(offsets.opcode), WHAT)?;
        let detour = detour.map(|at| Detour::read(view, at, kprobe));
        Ok(Self {
            opcode,
            moved: Moved::read(view, &offsets.moved, kprobe)?,
            detour: detour.transpose()?,
        })
    }
}

fn probe(
    view: &View<'_>,
    offsets: &Offsets,
    kprobe: Gva,
    doubt: &mut dyn FnMut(String),
) -> Result<Probe, Obstacle> {
    let (mut handlers, mut astray) = (Vec::new(), Vec::new());
    for offset in offsets.handlers {
        handlers.push(view.pointer(kprobe.wrapping_add(offset), WHAT)?);
    }
    let is_return = handlers
        .iter()
        .any(|&handler| view.is_one_of(handler, &["pre_handler_kretprobe"]));
    if is_return {
        for offset in offsets.returns {
            handlers.push(view.pointer(kprobe.wrapping_add(offset), WHAT)?);
        }
        go_on(returned_to(view, offsets, kprobe, &mut astray), doubt)?;
    }
    handlers.retain(|handler| handler.0 != 0);
    Ok(Probe {
        kprobe,
        is_return,
        handlers,
        astray,
    })
}

/// Whom a kretprobe's rethook calls beside its own handlers.
fn returned_to(
    view: &View<'_>,
    offsets: &Offsets,
    kprobe: Gva,
    astray: &mut Vec<Gva>,
) -> Result<(), Obstacle> {
    let Some(rethook) = offsets.rethook else {
        return Ok(());
    };
    let rethook = view.pointer(kprobe.wrapping_add(rethook), WHAT)?;
    let [handler, _] = offsets.returns;
    let returns = (kprobe, handler, "kretprobe_rethook_handler");
    let led = dispatch::led_astray(view, rethook, returns)?;
    astray.extend(led.into_iter().map(|(_, _, function)| function));
    Ok(())
}

/// Where in the kernel's text places are, by their distance from its beginning.
type ByDistance<'p> = BTreeMap<usize, Vec<&'p Place>>;

impl Probes {
    /// Puts into the kernel's text what kprobes took out of it, where that is all that
    /// they did. Where two are in the table for one address, the kernel goes by either
    /// (`get_kprobe()`), and it does for neither.
    pub(super) fn restore(&self, view: &View<'_>, owners: &Owners, text: &mut [u8]) {
        let mut all = ByDistance::new();
        for place in &self.places {
            let link = view.kernel.link(place.at);
            let distance = link.wrapping_sub(view.symbols.text().start);
            if let Some(distance) = usize::try_from(distance).ok().filter(|&at| at < text.len()) {
                all.entry(distance).or_default().push(place);
            }
        }
        let mut room = MAX_DECODED;
        // From below: what a function has before a place is as it was by then, if that is
        // known.
        for (&distance, places) in &all {
            let changed = matches!(text.get(distance), Some(&INT3 | &JUMP));
            let [place] = **places else { continue };
            let taken = place.taken.as_ref().filter(|_| changed);
            if let Some(taken) = taken.filter(|_| place.is_own(view)) {
                let whole = taken.whole(view, text, distance, &mut room);
                let was = whole.and_then(|whole| {
                    taken.original(view, owners, place.at, text.get(distance..)?, &whole)
                });
                let now = text.get_mut(distance..).unwrap_or_default();
                let both = now.iter_mut().zip(was.into_iter().flatten());
                both.for_each(|(now, was)| *now = was);
            }
        }
    }
}

impl Place {
    /// Whether anything is called, and all of it is the kernel's own.
    fn is_own(&self, view: &View<'_>) -> bool {
        let handlers = self
            .probes
            .iter()
            .flat_map(|probe| probe.handlers.iter().chain(&probe.astray));
        let mut handlers = handlers.peekable();
        handlers.peek().is_some() && handlers.all(|&handler| view.in_text(handler))
    }
}

impl Taken {
    /// The text at this place as the kprobe says that it was, and `None` where no
    /// instruction begins there. That is told by what is before it: what another kprobe
    /// took out there counts only once it was put back, for what the entries of others say
    /// could have anything begin anywhere. `room` is how much more may be taken apart.
    fn whole(
        &self,
        view: &View<'_>,
        text: &[u8],
        distance: usize,
        room: &mut usize,
    ) -> Option<Vec<u8>> {
        let link = view.symbols.text().start.wrapping_add(distance as u64);
        let (_, within) = view.symbols.symbol_before(link)?;
        let begin = distance.checked_sub(usize::try_from(within).ok()?)?;
        *room = room.checked_sub(distance - begin)?;
        let end = text.len().min(distance + MOST);
        let mut code = text.get(begin..end)?.to_vec();
        self.put_back(code.get_mut(distance - begin..)?);
        lengths::ends(&code, distance - begin).then(|| code.split_off(distance - begin))
    }

    /// Puts what the kprobe took out of the text where its breakpoint or its jump is.
    fn put_back(&self, code: &mut [u8]) {
        match (code, &self.detour) {
            // It goes on in the detour where there is one already
            // (`setup_detour_execution()`).
            ([first @ INT3, ..], _) => *first = self.opcode,
            ([first @ JUMP, a, b, c, d, ..], Some(detour)) => {
                *first = self.opcode;
                [*a, *b, *c, *d] = detour.kept;
            }
            _ => {}
        }
    }

    /// What the kprobe took out of the kernel's text, where that is all that it did: put
    /// a breakpoint there, or a jump to its own code. `now` is the text from `at` on, and
    /// `whole` what that was.
    fn original(
        &self,
        view: &View<'_>,
        owners: &Owners,
        at: Gva,
        now: &[u8],
        whole: &[u8],
    ) -> Option<Vec<u8>> {
        let stands_for = |detour: &Detour| detour.stands_for(view, owners, at, whole);
        let (is_right, length) = match (now.first()?, &self.detour) {
            (&INT3, detour) => {
                let moved = self.moved.stands_for(view, owners, at, whole);
                (moved && detour.as_ref().is_none_or(stands_for), 1)
            }
            (&JUMP, Some(detour)) => {
                let leads = jump(at.0, now).is_some_and(|jump| jump.target == detour.to.0);
                (leads && stands_for(detour), 5)
            }
            _ => (false, 0),
        };
        is_right.then(|| whole.iter().take(length).copied().collect())
    }
}

/// Judges whom kprobes call.
pub(super) fn handlers(view: &View<'_>, owners: &Owners, probes: &Probes, report: &mut Report) {
    let mut doubt = probes.doubt.clone();
    for place in &probes.places {
        for probe in &place.probes {
            match judge(view, owners, place.at, probe, report) {
                Ok(None) => {}
                Ok(Some(unknown)) => {
                    doubt.get_or_insert(unknown);
                }
                Err(error) => {
                    doubt.get_or_insert(error.to_string());
                }
            }
        }
    }
    report.done(Check::Kprobes, probes.places.len() as u64, doubt);
}

/// Judges a probe's functions, and says where it cannot.
fn judge(
    view: &View<'_>,
    owners: &Owners,
    at: Gva,
    probe: &Probe,
    report: &mut Report,
) -> Result<Option<String>, Obstacle> {
    let kind = if probe.is_return {
        "kretprobe"
    } else {
        "kprobe"
    };
    let place = format!("{kind} at {}", view.name(at));
    let (mut own, mut unknown) = (Vec::new(), None);
    for &handler in &probe.handlers {
        let owner = match owners.owner(view, handler) {
            Owner::Kernel(_) if dispatch::kprobe_runs_bpf(view, probe.kprobe, handler)? => {
                "a BPF program".to_owned()
            }
            Owner::Kernel(name) => {
                if !Role::Probe.has(view, handler) {
                    unknown = Some(known::unknown(view, &place, handler));
                }
                own.push(name);
                continue;
            }
            owner => owner.to_string(),
        };
        report.add(Finding {
            check: Check::Kprobes,
            place: place.clone(),
            address: at.0,
            expected: "a function of the kernel's".to_owned(),
            found: view.name(handler),
            owner: Some(owner),
        });
    }
    // The kernel's own too: none of them takes what it is given there.
    for &function in &probe.astray {
        report.add(Finding {
            check: Check::Kprobes,
            place: place.clone(),
            address: at.0,
            expected: "its own handler, by kretprobe_rethook_handler".to_owned(),
            found: view.name(function),
            owner: Some(owners.owner(view, function).to_string()),
        });
    }
    if !own.is_empty() {
        report.note(format!("{place}, of the kernel's own: {}", own.join(", ")));
    }
    Ok(unknown)
}
