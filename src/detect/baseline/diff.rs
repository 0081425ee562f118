//! What two baselines do not have in common.

use std::collections::BTreeSet;

use super::{Band, Baseline};

/// Something that only one of two baselines has.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Difference {
    /// What kind of thing, as the file calls it.
    pub part: &'static str,
    /// Only the second has it, not only the first.
    pub added: bool,
    /// The thing.
    pub what: String,
}

/// All that is only in one of them, sorted.
pub fn differences(old: &Baseline, new: &Baseline) -> Vec<Difference> {
    let (old, new) = (things(old), things(new));
    let one_sided = |from: &Things, to: &Things, added| {
        from.difference(to)
            .map(|(part, what)| Difference {
                part,
                added,
                what: what.clone(),
            })
            .collect::<Vec<_>>()
    };
    let mut all = one_sided(&old, &new, false);
    all.extend(one_sided(&new, &old, true));
    all.sort();
    all
}

type Things = BTreeSet<(&'static str, String)>;

fn things(baseline: &Baseline) -> Things {
    let mut all = Things::new();
    all.insert(("kernel", baseline.kernel.clone()));
    for (name, root) in &baseline.roots {
        all.extend(
            root.callers
                .iter()
                .map(|site| ("caller", format!("{name} from {site}"))),
        );
        let bands = [("calls", root.calls), ("duration", root.duration)];
        for (part, band) in bands {
            all.extend(band.map(|band| (part, format!("{name} {}", shown(band)))));
        }
    }
    for (name, function) in &baseline.functions {
        let callees = function.callees.keys();
        all.extend(callees.map(|callee| ("callee", format!("{name} -> {callee}"))));
        let always = function.always.iter().flatten();
        all.extend(always.map(|callee| ("always", format!("{name} -> {callee}"))));
        all.extend(
            function
                .order
                .iter()
                .map(|order| ("order", format!("{name}: {order}"))),
        );
        let modules = function.from_modules.iter();
        all.extend(modules.map(|module| ("module", format!("{name} from {module}"))));
        if function.nested {
            all.insert(("nested", name.clone()));
        }
    }
    for (process, sequences) in &baseline.processes {
        all.extend(
            sequences
                .iter()
                .map(|of| ("sequence", format!("{process}: {of}"))),
        );
    }
    all
}

fn shown(band: Band) -> String {
    format!(
        "{}..{}, medians {}..{}",
        band.low, band.high, band.lowest_median, band.highest_median
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_only_one_has_is_told_with_its_side() {
        let old = Baseline::new("k");
        let mut new = old.clone();
        assert!(differences(&old, &new).is_empty());
        let function = new.functions.entry("vfs_read".into()).or_default();
        function.callees.insert("evil".into(), 1);
        new.roots.entry("__x64_sys_read".into()).or_default();
        let callee = |added| {
            vec![Difference {
                part: "callee",
                added,
                what: "vfs_read -> evil".into(),
            }]
        };
        assert_eq!(differences(&old, &new), callee(true));
        assert_eq!(differences(&new, &old), callee(false));
    }
}
