//! The verdict on sessions on disk, and its form.

use std::path::Path;

use serde_json::Value;

use super::*;
use crate::detect::baseline::Root;
use crate::detect::{Evidence, LearnError, Learnt, Mark, PathStep, MIN_CALLS};
use crate::kernel::control::RecordTypes;
use crate::kernel::Symbols;
use crate::keys::Tamper;
use crate::ring::RecordFormat;
use crate::session::{
    Boot, ControlFlow, EndReason, Finding as Caught, GuestCounts, MapId, Meta, Mode, QemuProcess,
    SessionWriter, SwitchChange, FINDINGS_FILE, KLOG_FILE, MODULES_FILE,
};
use crate::test_schema::has_the_fields;

const BANNER: &str = "Linux version 6.1.0-xf\n";

/// The one boot of it.
fn boot(map: MapId) -> Boot {
    Boot {
        number: 1,
        boot_id: 1,
        banner: BANNER.into(),
        symbols: map,
        slide: 0,
        phys_text: 0,
        levels: 4,
        nr_cpus: 2,
        types: RecordFormat::Keyed(RecordTypes {
            root: 1,
            call: 2,
            ret: 3,
            plain_call: 4,
            plain_ret: 5,
        }),
        found_ns: 1,
        clocks: None,
    }
}

/// A closed session without records, in which the guest was caught at `kinds`.
fn session(dir: &Path, kinds: &[FindingKind]) -> Session {
    let symbols = Symbols::parse(
        "ffffffff81000000 T _text\nffffffff81000000 T _stext\nffffffff81000040 T vfs_read\n\
         ffffffff81001000 T _etext\nffffffff81003000 B _end\n"
            .into(),
    )
    .expect("symbols");
    let meta = Meta {
        version: 1,
        domain: "web1".into(),
        uuid: uuid::uuid!("6f1d6a2e-1f0c-4b7e-9d3a-0123456789ab"),
        mode: Mode::Keyed,
        state: State::Closed,
        qemu: QemuProcess {
            pid: 1,
            start_time: 1,
        },
        started_ns: 1,
        ended_ns: Some(2),
        end: Some(EndReason::Off),
        interval_ns: 1_000_000_000,
        switches: Vec::new(),
        boots: Vec::new(),
        counters: Default::default(),
        guest_counts: None,
    };
    let place = dir.join("session");
    let mut writer = SessionWriter::create(&place, meta).expect("a session");
    let map = writer.store_symbols(&symbols, 0).expect("its symbols");
    writer.meta.boots.push(boot(map));
    writer.save().expect("a session");
    crate::keys::Klog::create(&place.join(KLOG_FILE)).expect("a klog");
    for kind in kinds {
        let caught = Caught {
            wall_ns: 5,
            kind: kind.clone(),
        };
        writer.finding(&caught).expect("a finding");
    }
    writer.sync().expect("a session");
    Session::open(&place).expect("a session")
}

fn touched() -> FindingKind {
    FindingKind::KeyChanged(Tamper::Key { epoch: 3 })
}

#[test]
fn a_trace_of_nothing_proves_nothing() {
    let dir = tempfile::tempdir().expect("a directory");
    let verdict = check(&session(dir.path(), &[]), None).expect("a verdict");
    assert_eq!(verdict.conclusion, Conclusion::CouldNotTell);
    assert!(verdict.doubts[0].contains("no calls"), "{verdict:?}");
}

#[test]
fn what_the_helper_caught_is_a_finding_and_repeats_are_counted() {
    let dir = tempfile::tempdir().expect("a directory");
    let kinds = [
        touched(),
        FindingKind::RecordingOff { gate: None },
        touched(),
        FindingKind::RecordingOff {
            gate: Some("a gate".to_owned()),
        },
        FindingKind::TracerOff,
        FindingKind::BufferSwapped,
    ];
    let verdict = check(&session(dir.path(), &kinds), None).expect("a verdict");
    assert_eq!(verdict.conclusion, Conclusion::Findings);
    let mut found: Vec<(Rule, u64)> = verdict
        .findings
        .iter()
        .map(|finding| (finding.rule, finding.count))
        .collect();
    found.sort();
    assert_eq!(
        found,
        [
            (Rule::KeyTouched, 2),
            (Rule::TracerOff, 1),
            (Rule::RecordingOff, 1),
            (Rule::RecordingOff, 1),
            (Rule::BufferSwapped, 1)
        ]
    );
    let what = "recording was off while the trace was on, by a gate";
    assert!(verdict.findings.iter().any(|found| found.what == what));
}

#[test]
fn a_guest_that_shuts_ever_other_gates_makes_no_endless_verdict() {
    let dir = tempfile::tempdir().expect("a directory");
    let kinds: Vec<FindingKind> = (0..100)
        .map(|gate| FindingKind::RecordingOff {
            gate: Some(gate.to_string()),
        })
        .collect();
    let verdict = check(&session(dir.path(), &kinds), None).expect("a verdict");
    assert_eq!(verdict.findings.len(), WAYS);
    let count: u64 = verdict.findings.iter().map(|found| found.count).sum();
    assert_eq!(count, 100);
}

#[test]
fn nothing_is_learnt_where_the_guest_was_caught() {
    let dir = tempfile::tempdir().expect("a directory");
    let refused = Baseline::of(&session(dir.path(), &[touched()])).unwrap_err();
    assert!(matches!(refused, LearnError::NotClean(_)), "{refused}");
    let dir = tempfile::tempdir().expect("a directory");
    let refused = Baseline::of(&session(dir.path(), &[])).unwrap_err();
    assert!(matches!(refused, LearnError::Empty), "{refused}");
}

/// What a baseline has yet to see is found by it, and would never be learnt.
#[test]
fn what_is_new_to_a_baseline_is_learnt_until_it_has_seen_enough() {
    let learnt = |severity: Severity, sessions: usize| {
        let dir = tempfile::tempdir().expect("a directory");
        let kind = FindingKind::ControlFlow(Box::new(ControlFlow {
            rule: Rule::UnexpectedCallee.name().to_owned(),
            severity: severity.text().to_owned(),
            subject: "vfs_read".to_owned(),
            what: "vfs_read calls something".to_owned(),
            count: 20,
            evidence: Value::Null,
        }));
        let mut known = Baseline::new(BANNER);
        let learnt = |number: usize| (number.to_string(), Learnt::default());
        known.sessions = (0..sessions).map(learnt).collect();
        // Of sessions that teach nothing two are enough.
        assert_eq!(known.has_converged(), sessions >= 2);
        known.learn(&session(dir.path(), &[kind])).unwrap_err()
    };
    for (severity, sessions, refused) in [
        (Severity::Warning, 1, false),
        (Severity::Warning, 2, true),
        (Severity::Critical, 1, true),
        (Severity::Critical, 2, true),
    ] {
        let error = learnt(severity, sessions);
        let is_refused = matches!(error, LearnError::Judged(_));
        assert_eq!(is_refused, refused, "{severity:?} {sessions}: {error}");
        // It has no calls.
        assert!(refused || matches!(error, LearnError::Empty), "{error}");
    }
}

/// Whoever narrows the filter in the guest has it look as if nobody made the call.
#[test]
fn what_was_to_be_traced_and_never_came_is_remarked() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut session = session(dir.path(), &[]);
    let names = ["__x64_sys_read", "__x64_sys_getdents64", "vfs_open"].map(str::to_owned);
    session.meta.switches.push(SwitchChange {
        wall_ns: 1,
        functions: names.to_vec(),
        pickup_ns: 0,
        worked_ns: 0,
    });
    let mut known = Baseline::new(BANNER);
    for name in &names[..2] {
        known.roots.insert(name.clone(), Root::default());
    }
    let told = |roots: &[String]| {
        let mut remarks = Vec::new();
        compare_roots(&session, roots, &known, &mut Vec::new(), &mut remarks);
        remarks
            .iter()
            .any(|remark| remark.starts_with("__x64_sys_getdents64 was to be traced"))
    };
    assert!(told(&names[..1]));
    assert!(!told(&names[..2]));
}

#[test]
fn a_baseline_of_another_kernel_tells_nothing() {
    let dir = tempfile::tempdir().expect("a directory");
    let other = Baseline::new("Linux version 6.1.0-other");
    let verdict = check(&session(dir.path(), &[]), Some(("web", &other))).expect("a verdict");
    assert_eq!(verdict.conclusion, Conclusion::CouldNotTell);
    assert!(verdict.doubts[0].contains("another kernel"), "{verdict:?}");
    let same = Baseline::new(BANNER);
    let dir = tempfile::tempdir().expect("a directory");
    let verdict = check(&session(dir.path(), &[]), Some(("web", &same))).expect("a verdict");
    assert!(!verdict.doubts[0].contains("another kernel"), "{verdict:?}");
}

#[test]
fn a_list_that_never_stands_still_tells_nothing() {
    let dir = tempfile::tempdir().expect("a directory");
    let session = session(dir.path(), &[]);
    let look = "{\"boot\":1,\"since\":5,\"modules\":[]}\n";
    std::fs::write(session.dir().join(MODULES_FILE), look).expect("written");
    let half = MIN_CALLS / 2;
    for (all, in_doubt, not_told, is_judged) in [
        (MIN_CALLS, half, half, true),
        (MIN_CALLS, half + 1, 1, false),
        // Nothing was there but what is listed.
        (MIN_CALLS, MIN_CALLS, 0, true),
        (MIN_CALLS - 1, MIN_CALLS - 1, MIN_CALLS - 1, true),
        (0, 0, 0, true),
    ] {
        let mut profile = Profile::new(ProfileLimits::default());
        profile.in_modules = InModules {
            all,
            in_doubt,
            not_told,
            excused: 0,
        };
        // What it cannot tell is not clean.
        let mut doubts = Vec::new();
        let rules = not_judged(&session, &profile, &mut doubts, &mut Vec::new());
        let rules = rules.expect("rules");
        assert_eq!(rules.is_empty(), is_judged, "{:?}", profile.in_modules);
        assert_eq!(doubts.is_empty(), is_judged, "{doubts:?}");
        assert!(is_judged || rules == [Rule::UnlistedModule], "{rules:?}");
    }
}

/// Who has each call to a module look as if records were lost before it, is told of.
#[test]
fn where_most_of_what_modules_do_is_excused_nothing_is_judged_by_it() {
    let dir = tempfile::tempdir().expect("a directory");
    let session = session(dir.path(), &[]);
    let look = "{\"boot\":1,\"since\":5,\"modules\":[]}\n";
    std::fs::write(session.dir().join(MODULES_FILE), look).expect("written");
    for (all, excused, is_told, is_judged) in [
        (0, MIN_SEEN - 1, false, true),
        (0, MIN_SEEN, true, true),
        (0, MIN_CALLS, true, false),
        (MIN_CALLS, MIN_CALLS, true, true),
        (MIN_CALLS, MIN_CALLS + 1, true, false),
    ] {
        let mut profile = Profile::new(ProfileLimits::default());
        (profile.in_modules.all, profile.in_modules.excused) = (all, excused);
        let (mut remarks, mut doubts) = (Vec::new(), Vec::new());
        let rules = not_judged(&session, &profile, &mut doubts, &mut remarks);
        assert_eq!(remarks.len(), usize::from(is_told), "{remarks:?}");
        assert_eq!(doubts.is_empty(), is_judged, "{doubts:?}");
        let wanted = [Rule::UnlistedModule, Rule::UnknownModule];
        let rules = rules.expect("rules");
        assert_eq!(rules.is_empty(), is_judged, "{rules:?}");
        assert!(is_judged || wanted.iter().all(|rule| rules.contains(rule)));
    }
}

#[test]
fn plain_records_prove_nothing_and_the_rules_that_need_more_are_named() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut session = session(dir.path(), &[]);
    let unknown = check(&session, None).expect("a verdict");
    assert_eq!(unknown.not_judged, [Rule::UnlistedModule]);
    let look = "{\"boot\":1,\"since\":5,\"modules\":[]}\n{\"boot\":1,\"si";
    std::fs::write(session.dir().join(MODULES_FILE), look).expect("written");
    let keyed = check(&session, None).expect("a verdict");
    assert_eq!(keyed.not_judged, []);
    session.meta.mode = Mode::Plain;
    session.meta.counters.records = 60;
    let mut counts = GuestCounts::default();
    counts.written = 100;
    session.meta.guest_counts = Some(counts);
    let plain = check(&session, None).expect("a verdict");
    assert_eq!(plain.conclusion, Conclusion::CouldNotTell);
    assert!(plain.not_judged.contains(&Rule::WrongCaller));
    assert!(!plain.not_judged.contains(&Rule::UnexpectedCallee));
    assert_eq!(
        (plain.lost, plain.doubts.len()),
        (40, keyed.doubts.len() + 1)
    );
}

#[test]
fn a_half_written_last_finding_is_left_out() {
    let dir = tempfile::tempdir().expect("a directory");
    let session = session(dir.path(), &[touched()]);
    let path = session.dir().join(FINDINGS_FILE);
    let mut text = std::fs::read_to_string(&path).expect("text");
    text.push_str("{\"wall_ns\":5,\"find");
    std::fs::write(&path, text).expect("written");
    assert_eq!(session.findings().expect("findings").len(), 1);
}

/// A verdict in which everything is there.
fn full() -> Verdict {
    Verdict {
        format: FORMAT.into(),
        version: VERSION,
        conclusion: Conclusion::Findings,
        domain: "web1".into(),
        session: "/s".into(),
        kernel: Some("Linux".into()),
        baseline: Some(Compared {
            name: "web".into(),
            sessions: 2,
            converged: true,
        }),
        calls: 1,
        lost: 0,
        skipped: Skipped::default(),
        not_judged: vec![Rule::WrongCaller],
        doubts: vec!["d".into()],
        remarks: vec!["r".into()],
        findings: vec![Finding {
            rule: Rule::OutsideText,
            severity: Severity::Critical,
            subject: "vfs_read".into(),
            what: "w".into(),
            count: 1,
            of: Some(2),
            evidence: Some(Evidence {
                wall_ns: Some(1),
                guest_ns: 1,
                boot: 1,
                cpu: 0,
                pid: 7,
                task: Some("cat".into()),
                path: vec![PathStep {
                    function: "vfs_read".into(),
                    caller: Some("0x5555".into()),
                    mark: Some(Mark::Outside),
                }],
            }),
        }],
        not_listed: 0,
    }
}

#[test]
fn the_schema_describes_the_verdict() {
    let schema: Value =
        serde_json::from_str(include_str!("../../../docs/verdict.schema.json")).expect("a schema");
    let verdict = serde_json::to_value(full()).expect("JSON");
    let parts = &schema["$defs"];
    let finding = &verdict["findings"][0];
    has_the_fields(&verdict, &parts["flow"]);
    has_the_fields(&verdict["baseline"], &parts["compared"]);
    has_the_fields(&verdict["skipped"], &parts["skipped"]);
    has_the_fields(finding, &parts["finding"]);
    has_the_fields(&finding["evidence"], &parts["evidence"]);
    has_the_fields(&finding["evidence"]["path"][0], &parts["step"]);

    let choices = |of: &Value| of["enum"].as_array().expect("choices").clone();
    let rules: Vec<Value> = Rule::ALL.iter().map(|rule| rule.name().into()).collect();
    assert_eq!(choices(&parts["finding"]["properties"]["rule"]), rules);
    for conclusion in choices(&parts["flow"]["properties"]["conclusion"]) {
        serde_json::from_value::<Conclusion>(conclusion).expect("a conclusion");
    }
    for severity in choices(&parts["finding"]["properties"]["severity"]) {
        serde_json::from_value::<Severity>(severity).expect("a severity");
    }
    for mark in choices(&parts["step"]["properties"]["mark"]) {
        serde_json::from_value::<Mark>(mark).expect("a mark");
    }
}

#[test]
fn a_field_that_nobody_knows_is_refused() {
    let mut verdict = serde_json::to_value(full()).expect("JSON");
    assert_eq!(
        serde_json::from_value::<Verdict>(verdict.clone()).expect("a verdict"),
        full()
    );
    verdict["findings"][0]["more"] = 1.into();
    assert!(serde_json::from_value::<Verdict>(verdict).is_err());
}
