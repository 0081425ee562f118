//! Reading and editing of domain XML: by example, by property, and against
//! hostile text.

use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::test_time::cpu_time;

const PLAIN: &str = "<domain type='qemu' id='3'>
  <name>web &amp; co</name>
  <uuid>9a3f1c50-7f1e-4f0e-8f5e-0123456789ab</uuid>
  <!-- keep <memoryBacking/> me -->
  <memory unit='KiB'>524288</memory>
  <currentMemory unit='KiB'>524288</currentMemory>
  <vcpu placement='static'>2</vcpu>
  <os>
    <type arch='x86_64' machine='pc-q35-7.2'>hvm</type>
  </os>
  <cpu mode='host-passthrough'>
    <numa>
      <cell id='0' cpus='0' memory='256' unit='MiB'/>
      <cell id='1' cpus='1' memory='262144' unit='KiB' memAccess='shared'/>
    </numa>
  </cpu>
  <devices>
    <disk type='file'><source file='/x'/></disk>
    <memory model='dimm' access='shared'>
      <target><size unit='GiB'>1</size><node>0</node></target>
    </memory>
  </devices>
</domain>
";

fn options() -> Trace {
    Trace {
        functions: vec!["sys_openat".into(), "sys_read".into()],
        interval: Some(Duration::from_millis(1500)),
        at_start: true,
        symbols: Some("/srv/maps/a \"b\" & <c>".into()),
        baseline: Some("web-1".into()),
        integrity_interval: Some("30s".parse().unwrap()),
        ..Trace::default()
    }
}

/// A domain that boots a kernel directly, with this in its `<os>`.
fn direct(os: &str) -> String {
    let kernel = "\n    <kernel>/boot/vmlinuz</kernel>";
    PLAIN.replace("hvm</type>", &format!("hvm</type>{kernel}{os}"))
}

fn plain(cmdline: &str) -> Trace {
    Trace {
        cmdline: Some(cmdline.to_owned()),
        ..options()
    }
}

#[test]
fn the_label_of_a_running_domain_tells_the_user_of_its_qemu() {
    let user = |labels: &str| {
        let xml = PLAIN.replace("</domain>", &format!("{labels}</domain>"));
        DomainXml::parse(&xml).unwrap().qemu_user
    };
    let dac = |label: &str| {
        format!(
            "<seclabel type='dynamic' model='apparmor'><label>libvirt-9a3f</label></seclabel>\
             <seclabel type='dynamic' model='dac' relabel='yes'>{label}</seclabel>"
        )
    };
    assert_eq!(user(""), None);
    assert_eq!(
        user(&dac("<label>+64055:+107</label>")).as_deref(),
        Some("+64055")
    );
    assert_eq!(user(&dac("<label> me:us </label>")).as_deref(), Some("me"));
    assert_eq!(user(&dac("")), None);
    assert_eq!(user(&dac("<label/>")), None);
}

#[test]
fn what_a_kernel_is_booted_with_is_put_in_and_taken_out_again() {
    let (first, second) = ("ftrace=x a=b,c", "ftrace=y <&>");
    for (os, one, two) in [
        ("", first, "ftrace=y &lt;&amp;&gt;"),
        (
            "\n    <cmdline>quiet</cmdline>",
            "quiet ftrace=x a=b,c",
            "quiet ftrace=y &lt;&amp;&gt;",
        ),
        ("\n    <cmdline/>", first, "ftrace=y &lt;&amp;&gt;"),
        (
            "\n    <initrd>/i</initrd>\n    <cmdline>a  b </cmdline>",
            "a  b  ftrace=x a=b,c",
            "a  b  ftrace=y &lt;&amp;&gt;",
        ),
    ] {
        let before = direct(os);
        let enrolled = enroll(&before, &plain(first)).unwrap();
        assert!(enrolled.cmdline_changed);
        let has = |xml: &str, text: &str| {
            let line = format!("<cmdline>{text}</cmdline>");
            assert_eq!(xml.matches("<cmdline").count(), 1, "{xml}");
            assert!(xml.contains(&line), "no {line} in\n{xml}");
        };
        has(&enrolled.xml, one);
        let same = enroll(&enrolled.xml, &plain(first)).unwrap();
        assert!(!same.changed, "enrolled like this already");
        // Other functions: other parameters, in the place of the first.
        let again = enroll(&enrolled.xml, &plain(second)).unwrap();
        has(&again.xml, two);
        for xml in [&enrolled.xml, &again.xml] {
            assert_eq!(unenroll(xml).unwrap().as_deref(), Some(before.as_str()));
        }
        // Without it again, though still enrolled.
        let keyed = enroll(&again.xml, &options()).unwrap();
        assert_eq!(keyed.xml, enroll(&before, &options()).unwrap().xml);
    }
}

#[test]
fn a_domain_that_boots_no_kernel_directly_gets_no_command_line() {
    let enrolled = enroll(PLAIN, &plain("ftrace=x")).unwrap();
    assert!(!enrolled.cmdline_changed);
    assert!(!enrolled.xml.contains("ftrace=x"), "{}", enrolled.xml);
}

#[test]
fn what_somebody_made_of_the_command_line_since_stays() {
    let enrolled = enroll(
        &direct("\n    <cmdline>quiet</cmdline>"),
        &plain("ftrace=x"),
    )
    .unwrap();
    let edited = enrolled
        .xml
        .replace("quiet ftrace=x", "quiet ftrace=x debug");
    let after = unenroll(&edited).unwrap().unwrap();
    assert!(after.contains("<cmdline>quiet debug</cmdline>"), "{after}");
    let other = enrolled.xml.replace("quiet ftrace=x", "mine");
    let after = unenroll(&other).unwrap().unwrap();
    assert!(after.contains("<cmdline>mine</cmdline>"), "{after}");
}

#[test]
fn reads_what_it_needs() {
    let domain = DomainXml::parse(PLAIN).unwrap();
    assert_eq!(domain.name, "web & co");
    assert_eq!(
        domain.uuid.to_string(),
        "9a3f1c50-7f1e-4f0e-8f5e-0123456789ab"
    );
    assert_eq!(domain.id, Some(3));
    assert_eq!(domain.memory, 512 << 20);
    assert_eq!(domain.family(), MachineFamily::Q35);
    assert_eq!(domain.arch.as_deref(), Some("x86_64"));
    assert_eq!(domain.backing, MemoryBacking::default());
    assert_eq!(domain.numa.len(), 2);
    assert!(domain.numa.iter().all(|cell| cell.memory == 256 << 20));
    assert_eq!(domain.numa[1].access, Some(Access::Shared));
    assert_eq!(domain.modules.len(), 1);
    assert_eq!(domain.modules[0].size, 1 << 30);
    assert_eq!(domain.trace, None);
}

#[test]
fn enrols_and_says_what_was_there() {
    let enrolled = enroll(PLAIN, &options()).unwrap();
    assert!(enrolled.changed && enrolled.memory_changed);
    assert!(
        enrolled.xml.contains(
            "  <currentMemory unit='KiB'>524288</currentMemory>
  <memoryBacking>
    <source type='file'/>
    <access mode='shared'/>
  </memoryBacking>
  <vcpu"
        ),
        "{}",
        enrolled.xml
    );
    assert!(
        enrolled.xml.contains(
            "</uuid>
  <metadata>
    <xftrace:trace xmlns:xftrace=\"urn:xftrace:domain:1.0\" functions=\"sys_openat,sys_read\" \
             interval=\"1s 500ms\" at-start=\"yes\" \
             symbols=\"/srv/maps/a &quot;b&quot; &amp; &lt;c&gt;\" baseline=\"web-1\" \
             integrity-interval=\"30s\" \
             before=\"no-metadata,no-backing\"/>
  </metadata>
"
        ),
        "{}",
        enrolled.xml
    );
    let domain = DomainXml::parse(&enrolled.xml).unwrap();
    assert!(crate::libvirt::enrolment::memory(&domain) == "shared file");
    let trace = domain.trace.unwrap();
    assert_eq!(trace.problems, [""; 0]);
    assert!(trace.same_options(&options()));
    assert_eq!(unenroll(&enrolled.xml).unwrap().unwrap(), PLAIN);
}

#[test]
fn enrolling_again_sets_the_options_anew_and_keeps_the_past() {
    let first = enroll(PLAIN, &options()).unwrap().xml;
    let again = enroll(&first, &Trace::default()).unwrap();
    assert!(again.changed && !again.memory_changed);
    let trace = DomainXml::parse(&again.xml).unwrap().trace.unwrap();
    assert!(trace.same_options(&Trace::default()));
    assert_eq!(unenroll(&again.xml).unwrap().unwrap(), PLAIN);

    let required = first.replace("at-start=\"yes\"", "required=\"yes\"");
    let again = enroll(&required, &options()).unwrap().xml;
    assert!(DomainXml::parse(&again).unwrap().trace.unwrap().required);
}

#[test]
fn what_someone_changed_in_between_stays() {
    let enrolled = enroll(PLAIN, &options()).unwrap().xml;
    let theirs = enrolled
        .replace("<source type='file'/>", "<source type='memfd'/>")
        .replace("<memoryBacking>", "<memoryBacking>\n    <locked/>");
    let left = unenroll(&theirs).unwrap().unwrap();
    assert!(left.contains("<locked/>") && left.contains("<source type='memfd'/>"));
    assert!(!left.contains("<access") && !left.contains("<metadata>"));

    let theirs = enrolled.replace("  </metadata>", "    <a:b xmlns:a='u'/>\n  </metadata>");
    let left = unenroll(&theirs).unwrap().unwrap();
    assert!(left.contains("<metadata>\n    <a:b xmlns:a='u'/>\n  </metadata>"));
    assert_eq!(unenroll(&left).unwrap(), None);
}

#[test]
fn huge_pages_and_memfds_stay_what_they_are_and_become_shared() {
    for (backing, after, is) in [
        (
            "<hugepages/>",
            "<access mode='shared'/><hugepages/>",
            "huge pages",
        ),
        (
            "<hugepages/><access mode='private'/>",
            "<hugepages/><access mode='shared'/>",
            "huge pages",
        ),
        (
            "<source type='memfd'/>",
            "<access mode='shared'/><source type='memfd'/>",
            "memfd",
        ),
        (
            "<source type='memfd'/><access mode='shared'/>",
            "<source type='memfd'/><access mode='shared'/>",
            "memfd",
        ),
    ] {
        let with = |backing: &str| {
            let outer = format!("  <memoryBacking>{backing}</memoryBacking>\n  <vcpu");
            PLAIN.replace("  <vcpu", &outer)
        };
        let enrolled = enroll(&with(backing), &options()).unwrap();
        assert!(enrolled.xml.contains(after), "{}", enrolled.xml);
        assert_eq!(enrolled.memory_changed, backing != after);
        let domain = DomainXml::parse(&enrolled.xml).unwrap();
        assert_eq!(crate::libvirt::enrolment::memory(&domain), is);
        assert_eq!(unenroll(&enrolled.xml).unwrap().unwrap(), with(backing));
    }
}

#[test]
fn refuses_memory_that_cannot_be_a_shared_file() {
    for (backing, names) in [
        ("<source type='tape'/>", "tape"),
        ("<source/>", "without type"),
        ("<access mode='odd'/>", "odd"),
    ] {
        let xml = PLAIN.replace(
            "  <vcpu",
            &format!("  <memoryBacking>{backing}</memoryBacking>\n  <vcpu"),
        );
        let error = enroll(&xml, &options()).unwrap_err();
        assert!(matches!(error, XmlError::Unsupported { .. }), "{error}");
        assert!(error.to_string().contains(names), "{error}");
        assert!(error.to_string().contains("virsh edit"), "{error}");
    }
    for (from, to) in [
        ("memAccess='shared'", "memAccess='private'"),
        ("access='shared'", "access='private'"),
    ] {
        let error = enroll(&PLAIN.replace(from, to), &options()).unwrap_err();
        assert!(error.to_string().contains("private"), "{error}");
    }
}

#[test]
fn the_namespace_counts_and_not_the_prefix() {
    let with = |metadata: &str| {
        let xml = PLAIN.replace("  <memory unit", &format!("  {metadata}\n  <memory unit"));
        DomainXml::parse(&xml).unwrap().trace
    };
    let urn = NAMESPACE;
    for ours in [
        format!("<metadata><x:trace xmlns:x='{urn}' interval='2s'/></metadata>"),
        format!("<metadata><trace xmlns='{urn}' interval='2s'/></metadata>"),
        format!("<metadata xmlns:y='{urn}'><y:trace interval='2s'></y:trace></metadata>"),
    ] {
        let trace = with(&ours).unwrap_or_else(|| panic!("{ours}"));
        assert_eq!(trace.interval, Some(Duration::from_secs(2)));
    }
    for theirs in [
        "<metadata><xftrace:trace xmlns:xftrace='urn:other'/></metadata>".to_owned(),
        format!("<metadata xmlns:y='{urn}'><y:trace xmlns:y='urn:other'/></metadata>"),
        format!("<metadata><x:other xmlns:x='{urn}'/></metadata>"),
        format!("<metadata><a><x:trace xmlns:x='{urn}'/></a></metadata>"),
    ] {
        assert_eq!(with(&theirs), None, "{theirs}");
    }
}

#[test]
fn a_slip_in_the_metadata_costs_that_attribute_only() {
    let xml = PLAIN.replace(
        "  <memory unit",
        &format!(
            "<metadata><x:trace xmlns:x='{NAMESPACE}' functions='sys_read, vfs_read' \
             interval='1ms' at-start='true' symbols='map' before='lies' later='x' baseline='../web' \
             integrity-interval='1ms' \
             required='yes'/></metadata><memory unit"
        ),
    );
    let trace = DomainXml::parse(&xml).unwrap().trace.unwrap();
    assert_eq!(trace.functions, ["sys_read", "vfs_read"]);
    assert!(trace.required && !trace.at_start && trace.interval.is_none());
    let named: Vec<_> = trace
        .problems
        .iter()
        .map(|problem| problem.split(':').next().unwrap())
        .collect();
    assert_eq!(
        named,
        [
            "interval",
            "at-start",
            "symbols",
            "before",
            "baseline",
            "integrity-interval"
        ]
    );
}

#[test]
fn hostile_text_is_an_error() {
    let nested = |depth: usize| "<domain>".to_owned() + &"<a>".repeat(depth);
    let swap = |from: &str, to: &str| {
        let xml = PLAIN.replace(from, to);
        assert_ne!(xml, PLAIN, "{from}");
        xml
    };
    let cases = [
        String::new(),
        "   ".into(),
        "no xml".into(),
        "<domain>".into(),
        "<domain/>".into(),
        "<network/>".into(),
        "<domain></network>".into(),
        nested(10_000),
        format!("{PLAIN}{PLAIN}"),
        format!("{PLAIN}text"),
        format!("\u{feff}{PLAIN}"),
        swap("524288", "524\u{0}288"),
        format!("<!DOCTYPE d [<!ENTITY a 'b'>]>{PLAIN}"),
        swap("web &amp; co", "web &lol; co"),
        swap("web &amp; co", "a/b"),
        swap("web &amp; co", ".."),
        swap("web &amp; co", "a&#10;b"),
        swap("web &amp; co", "a&#x1b;[2Jb"),
        swap("web &amp; co", ""),
        swap("web &amp; co", &"x".repeat(5000)),
        swap("9a3f1c50", "../../.."),
        swap("<memory unit='KiB'>524288", "<memory unit='KiB'>-1"),
        swap("<memory unit='KiB'>524288", "<memory unit='EiB'>524288"),
        swap("<memory unit='KiB'>524288", "<memory unit='XB'>524288"),
        swap("<memory unit='KiB'", "<memory unit='KiB"),
        swap("</name>", "</name><name>again</name>"),
        "<domain>".to_owned() + &" ".repeat(MAX_XML),
    ];
    for xml in cases {
        let shown: String = xml.chars().take(300).collect();
        let error = DomainXml::parse(&xml).expect_err(&shown);
        assert!(error.to_string().len() < 12_000);
        assert!(enroll(&xml, &options()).is_err());
        let _ = unenroll(&xml);
    }
    assert!(DomainXml::parse_bytes(b"<domain>\xff\xfe</domain>").is_err());

    let nested = |depth: usize| {
        let inner = "<a>".repeat(depth) + &"</a>".repeat(depth);
        DomainXml::parse(&PLAIN.replace("<devices>", &format!("<devices>{inner}")))
    };
    assert!(nested(200).is_ok());
    assert!(nested(300).unwrap_err().to_string().contains("deeper"));
}

/// Texts at the size limit that would take hours in anything worse than
/// linear time.
#[test]
fn the_time_is_bounded() {
    let fill = |unit: &dyn Fn(usize) -> String| {
        let mut all = String::new();
        for n in 0.. {
            let next = unit(n);
            if all.len() + next.len() + 2000 > MAX_XML {
                break;
            }
            all += &next;
        }
        all
    };
    let attributes = fill(&|n| format!(" xmlns:a{n}='u'"));
    let tagged = |n: usize| format!("<m{n}/>");
    let cases = [
        PLAIN.replace("<domain ", &format!("<domain{attributes} ")),
        PLAIN.replace(
            "  <memory unit",
            &format!("<metadata><x:trace{attributes}/></metadata><memory unit"),
        ),
        PLAIN.replace(
            "  <memory unit",
            &format!("<metadata>{}</metadata><memory unit", fill(&tagged)),
        ),
        PLAIN.replace(
            "  <devices>",
            &format!("<devices>{}", fill(&|_| "<memory/>".to_owned())),
        ),
        PLAIN.replace(
            "  <devices>",
            &format!("<devices>{}", fill(&|_| "<d>".into())),
        ),
        PLAIN.replace("web", &fill(&|_| "&amp;".to_owned())),
        PLAIN.replace("-->", &format!("{}-->", fill(&|_| "<".to_owned()))),
    ];
    for xml in cases {
        assert!(xml.len() <= MAX_XML);
        let start = cpu_time();
        let _ = DomainXml::parse(&xml);
        let _ = enroll(&xml, &options());
        let _ = unenroll(&xml);
        // In an unoptimised build; a few milliseconds else.
        let taken = cpu_time() - start;
        assert!(taken < Duration::from_secs(20), "{taken:?}");
    }
}

/// A domain's XML in one of the many ways in which it can be written.
fn documents() -> impl Strategy<Value = String> {
    let space = prop_oneof![
        3 => Just("\n  "),
        1 => Just(""),
        1 => Just("\n\t"),
        1 => Just("\r\n "),
        1 => Just("  "),
        1 => Just("\n\n    "),
    ];
    let quote = prop_oneof![Just('\''), Just('"')];
    let metadata = prop_oneof![
        Just(""),
        Just("<metadata/>"),
        Just("<metadata a='1' />"),
        Just("<metadata></metadata>"),
        Just("<metadata>  \n</metadata>"),
        Just("<metadata>\n    <xftrace:trace xmlns:xftrace='urn:other'/>\n  </metadata>"),
        Just("<metadata><!-- c --><o:s xmlns:o='urn:o'>text</o:s></metadata>"),
    ];
    let backing = prop_oneof![
        Just(""),
        Just("<memoryBacking/>"),
        Just("<memoryBacking  />"),
        Just("<memoryBacking></memoryBacking>"),
        Just("<memoryBacking>\n    <locked/>\n  </memoryBacking>"),
        Just("<memoryBacking> <access mode=\"private\"/><source type='anonymous' /> </memoryBacking>"),
        Just("<memoryBacking><!-- x --><source type='file'></source></memoryBacking>"),
        Just("<memoryBacking>\n<access\n mode='shared' /><discard/></memoryBacking>"),
        Just("<memoryBacking><source type='file'/><access mode='shared'/></memoryBacking>"),
    ];
    let extra = prop_oneof![
        Just(""),
        Just("<!-- <metadata> in a comment -->"),
        Just("<title>a &lt; b</title>"),
        Just("<description><![CDATA[<memory>]]></description>"),
        Just("<q:commandline xmlns:q='u'><q:arg value='-memory'/></q:commandline>"),
        Just("<devices><memory model='dimm'><target><size>1</size></target></memory></devices>"),
        Just("<cpu><numa><cell id='0' memory='1'/></numa></cpu>"),
        Just("<?pi <memory/> ?>"),
    ];
    let head = prop_oneof![
        Just(""),
        Just("<?xml version='1.0'?>\n"),
        Just("<!-- id -->\n")
    ];
    (
        head,
        space,
        quote,
        metadata,
        backing,
        proptest::collection::vec(extra, 0..3),
        any::<[prop::sample::Index; 7]>(),
    )
        .prop_map(|(head, space, q, metadata, backing, extra, order)| {
            let mut parts: Vec<String> = vec![
                "<name>d</name>".into(),
                format!("<memory unit={q}KiB{q}>1024</memory>"),
                "<uuid>9a3f1c50-7f1e-4f0e-8f5e-0123456789ab</uuid>".into(),
                "<currentMemory>1024</currentMemory>".into(),
                metadata.into(),
                backing.into(),
            ];
            for (text, at) in extra.into_iter().zip(order) {
                // Only one of each, as libvirt has it.
                if !parts.iter().any(|part| part == text) {
                    parts.insert(at.index(parts.len() + 1), text.into());
                }
            }
            let [.., a, b] = order;
            let (a, b) = (a.index(parts.len()), b.index(parts.len()));
            parts.swap(a, b);
            let mut all = format!("{head}<domain type={q}kvm{q}>");
            for part in parts.iter().filter(|part| !part.is_empty()) {
                all += space;
                all += part;
            }
            all + "\n</domain>\n"
        })
}

fn traces() -> impl Strategy<Value = Trace> {
    (
        proptest::collection::vec("[a-z_][a-zA-Z0-9_.]{0,20}", 0..4),
        proptest::option::of(10u64..=3_600_000),
        any::<bool>(),
        proptest::option::of("/[a-zA-Z0-9 <>&'\"./é-]{1,30}"),
        proptest::option::of("[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,20}"),
        proptest::option::of(prop_oneof!["off", "[1-9][0-9]?m"]),
    )
        .prop_map(
            |(functions, interval, at_start, symbols, baseline, looks)| Trace {
                functions,
                interval: interval.map(Duration::from_millis),
                at_start,
                symbols: symbols.map(Into::into),
                baseline,
                integrity_interval: looks.map(|text| text.parse().unwrap()),
                ..Trace::default()
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn unenrolling_gives_back_every_byte(xml in documents(), wanted in traces(), then in traces()) {
        let enrolled = enroll(&xml, &wanted).unwrap();
        prop_assert!(enrolled.changed);
        let domain = DomainXml::parse(&enrolled.xml).unwrap();
        prop_assert!(crate::libvirt::enrolment::memory(&domain) == "shared file");
        let trace = domain.trace.unwrap();
        prop_assert!(trace.problems.is_empty(), "{:?}", trace.problems);
        prop_assert!(trace.same_options(&wanted));

        let again = enroll(&enrolled.xml, &wanted).unwrap();
        prop_assert!(!again.changed && again.xml == enrolled.xml);
        let other = enroll(&enrolled.xml, &then).unwrap();
        prop_assert!(!other.memory_changed);

        prop_assert_eq!(unenroll(&enrolled.xml).unwrap().unwrap(), xml.clone());
        prop_assert_eq!(unenroll(&other.xml).unwrap().unwrap(), xml.clone());
        prop_assert_eq!(unenroll(&xml).unwrap(), None);
    }

    #[test]
    fn mutated_xml_never_panics(
        xml in documents(),
        at in any::<prop::sample::Index>(),
        cut in 0usize..20,
        put in "[<>/&;='\"a-z \u{0}\u{e9}!\\[\\]-]{0,6}",
    ) {
        let mut bytes = enroll(&xml, &options()).unwrap().xml.into_bytes();
        let from = at.index(bytes.len());
        let to = (from + cut).min(bytes.len());
        bytes.splice(from..to, put.into_bytes());
        let _ = DomainXml::parse_bytes(&bytes);
        if let Ok(text) = std::str::from_utf8(&bytes) {
            // What can still be enrolled is a domain with shared memory then.
            if let Ok(enrolled) = enroll(text, &options()) {
                let domain = DomainXml::parse(&enrolled.xml).unwrap();
                prop_assert!(crate::libvirt::enrolment::memory(&domain) == "shared file" && domain.trace.is_some());
            }
            let _ = unenroll(text);
        }
    }

    #[test]
    fn arbitrary_text_never_panics(text in "\\PC{0,200}", bytes in any::<Vec<u8>>()) {
        let _ = DomainXml::parse(&text);
        let _ = DomainXml::parse_bytes(&bytes);
        let _ = enroll(&text, &options());
        let _ = unenroll(&text);
    }
}

#[test]
fn a_running_domains_modules_say_where_they_are() {
    let domain = DomainXml::parse(
        "<domain id='1'><name>n</name><uuid>9a3f1c50-7f1e-4f0e-8f5e-0123456789ab</uuid>\
         <memory>1</memory><devices><memory model='dimm'><target><size unit='KiB'>131072</size>\
         <node>0</node></target><alias name='dimm0'/>\
         <address type='dimm' slot='0' base='0x100000000'/></memory></devices></domain>",
    );
    let [module] = &domain.unwrap().modules[..] else {
        panic!("one module")
    };
    assert_eq!((module.size, module.base), (128 << 20, Some(4 << 30)));
    assert_eq!(module.alias.as_deref(), Some("dimm0"));
}
