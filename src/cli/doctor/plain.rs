//! What a guest without the patch is booted with.

use super::{restart, Report};
use crate::cli::enroll_command::enroll_command;
use crate::cli::guest_boot;
use crate::helper::protocol::{PlainBoot, PlainRing};
use crate::kernel::stock::is_reserved;
use crate::libvirt::xml::{DomainXml, Trace};

/// Tells where it records, or what to boot it with instead.
pub(super) fn check(boot: &PlainBoot, live: &DomainXml, name: &str, report: &mut Report) {
    match (&boot.ring, &boot.cannot) {
        (Some(ring), _) => report.ok(format!(
            "it is booted with what that takes: {}",
            traced(ring)
        )),
        (None, why) => {
            let why = why.as_deref().unwrap_or("not looked yet");
            report.missing(
                format!("what a kernel without the patch is booted with: {why}"),
                boot_with(boot, live, name),
            );
        }
    }
}

/// What is recorded, and where.
fn traced(ring: &PlainRing) -> String {
    let of = match &ring.instance {
        None => "the global ring buffer".to_owned(),
        Some(name) => format!("the ring buffer of instance '{name}'"),
    };
    let reserved = match ring.reserved {
        true => ", in memory reserved at boot",
        false => "",
    };
    format!(
        "calls of {} go to {of}{reserved} ({} KiB for each CPU)",
        ring.functions, ring.kb
    )
}

/// Has the guest's kernel booted with this, where the domain boots it directly,
/// and else tells what to do inside the guest.
fn boot_with(boot: &PlainBoot, live: &DomainXml, name: &str) -> String {
    let enroll = |needs: &str| {
        let mut wanted = live.trace.clone().unwrap_or_default();
        if wanted.functions.is_empty() || boot.unknown {
            wanted.functions = vec!["FUNCTION,..".to_owned()];
        }
        wanted.cmdline = Some(needs.to_owned());
        enroll_command(name, &wanted)
    };
    // It was booted for that: what is missing is typed inside it.
    if let Some(typed) = &boot.to_type {
        return format!("{typed}    (inside the guest, as root, after each boot)");
    }
    // Or is to be.
    let is_enrolled = |trace: &Trace| trace.cmdline.as_deref().is_some_and(is_reserved);
    if let (Some((needs, typed)), true) =
        (&boot.reserved, live.trace.as_ref().is_some_and(is_enrolled))
    {
        return format!(
            "{}    (puts {needs} on its command line)\n{}\n{typed}    (inside the guest, as \
             root, after each boot)",
            enroll(needs),
            restart(name)
        );
    }
    let needs = &boot.command_line;
    let mut mend = if live.boots_kernel {
        format!(
            "{}    (puts {needs} on its command line)\n{}",
            enroll(needs),
            restart(name)
        )
    } else {
        guest_boot::commands(needs)
    };
    if let Some((needs, typed)) = &boot.reserved {
        let instead = match live.boots_kernel {
            true => format!("{}, which puts {needs} there,", enroll(needs)),
            false => format!("have it booted with {needs} instead,"),
        };
        mend.push_str(&format!(
            "\n(or {instead} and after each boot type inside the guest, as root: {typed}; its \
             ring buffer lies in memory reserved at boot then)"
        ));
    }
    mend
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::stock::{command_line, reserved_command_line};

    fn domain(os: &str, functions: &str) -> DomainXml {
        let text = format!(
            "<domain type='qemu'><name>web1</name>\
             <uuid>9a3f1c50-7f1e-4f0e-8f5e-0123456789ab</uuid><memory>1024</memory>\
             <os>{os}</os><metadata><x:trace xmlns:x='urn:xftrace:domain:1.0' {functions}/>\
             </metadata></domain>"
        );
        DomainXml::parse(&text).unwrap()
    }

    fn boot(functions: &[&str], reserves: bool) -> PlainBoot {
        PlainBoot {
            ring: None,
            cannot: Some("it is not".to_owned()),
            command_line: command_line(functions),
            unknown: false,
            reserved: reserves.then(|| reserved_command_line(functions)),
            to_type: None,
        }
    }

    /// What is said of it, the states and the mends too.
    fn said(boot: &PlainBoot, live: &DomainXml) -> (String, String) {
        let mut report = Report::default();
        check(boot, live, "web1", &mut report);
        let check = report.checks.pop().unwrap();
        (check.what, check.mend.unwrap_or_default())
    }

    #[test]
    fn what_a_stock_kernel_is_booted_with_goes_where_it_is_booted_from() {
        let direct = "<kernel>/boot/vmlinuz</kernel>";
        let functions = "functions='sys_read, sys_openat'";
        let (what, mend) = said(
            &boot(&["__x64_sys_read"], false),
            &domain(direct, functions),
        );
        assert!(what.ends_with("is booted with: it is not"), "{what}");
        assert!(
            mend.contains(" --functions sys_read,sys_openat --plain ")
                && mend.contains("ftrace_graph_filter=__x64_sys_read "),
            "{mend}"
        );
        let (_, mend) = said(&boot(&["vfs_read"], false), &domain("", functions));
        assert!(!mend.contains("xftrace enroll"), "{mend}");
        assert!(
            mend.starts_with("mkdir -p /etc/default/grub.d && "),
            "{mend}"
        );
        assert!(!mend.contains("\n(or "), "{mend}");
    }

    /// With nothing in it, a filter lets through every function of the kernel.
    #[test]
    fn where_no_functions_are_named_yet_the_filter_is_not_empty() {
        for os in ["<kernel>/boot/vmlinuz</kernel>", ""] {
            let (_, mend) = said(&boot(&[], true), &domain(os, ""));
            assert!(mend.contains("ftrace_graph_filter=FUNCTION,.. "), "{mend}");
            assert!(!mend.contains("filter= "), "{mend}");
        }
        let direct = domain("<kernel>/boot/vmlinuz</kernel>", "");
        let (_, mend) = said(&boot(&[], false), &direct);
        assert!(mend.starts_with("xftrace enroll web1 --functions FUNCTION,.. --plain "));
    }

    #[test]
    fn a_domain_keeps_what_it_was_enrolled_with() {
        let direct = "<kernel>/boot/vmlinuz</kernel>";
        let live = domain(direct, "functions='sys_raed' baseline='web' at-start='yes'");
        let mut boot = boot(&[], false);
        let (_, mend) = said(&boot, &live);
        let all = "--functions sys_raed --baseline web --at-start --plain ";
        assert!(mend.contains(all), "{mend}");
        // A name that the kernel does not have is not to be typed again.
        boot.unknown = true;
        let (_, mend) = said(&boot, &live);
        assert!(
            mend.contains("--functions FUNCTION,.. --baseline web"),
            "{mend}"
        );
    }

    #[test]
    fn a_ring_in_reserved_memory_is_offered_where_the_kernel_can_have_one() {
        let (_, mend) = said(&boot(&["vfs_read"], true), &domain("", ""));
        let wanted = "ftrace_graph_filter=vfs_read reserve_mem=24M:4096:xf trace_instance=xf@xf";
        assert!(mend.contains(wanted), "{mend}");
        assert!(mend.contains("instances/xf/current_tracer; "), "{mend}");
        let direct = domain("<kernel>/boot/vmlinuz</kernel>", "functions='vfs_read'");
        let (_, mend) = said(&boot(&["vfs_read"], true), &direct);
        let enroll = "(or xftrace enroll web1 --functions vfs_read --plain=reserved, which puts ";
        assert!(mend.contains(enroll), "{mend}");
        // One that is enrolled for it lacks what is typed, and is not led away from it.
        let (needs, typed) = reserved_command_line(&["vfs_read"]);
        let enrolled = format!("functions='vfs_read' cmdline='{needs}'");
        let direct = domain("<kernel>/boot/vmlinuz</kernel>", &enrolled);
        let (_, mend) = said(&boot(&["vfs_read"], true), &direct);
        assert!(mend.starts_with("xftrace enroll web1 "), "{mend}");
        assert!(mend.contains(&format!("\n{typed}    (inside")), "{mend}");
        assert!(!mend.contains("ftrace=function_graph "), "{mend}");
        assert!(mend.contains("--plain=reserved"), "{mend}");
    }

    /// However it came to its command line.
    #[test]
    fn a_ring_without_a_tracer_is_given_one_inside_the_guest() {
        let mut boot = boot(&["vfs_read"], true);
        boot.to_type = Some("echo it".to_owned());
        let (_, mend) = said(&boot, &domain("", "functions='vfs_read'"));
        assert_eq!(
            mend,
            "echo it    (inside the guest, as root, after each boot)"
        );
    }

    #[test]
    fn it_is_told_which_ring_has_which_calls() {
        let mut boot = boot(&["vfs_read"], true);
        boot.cannot = None;
        let mut ring = PlainRing {
            instance: None,
            reserved: false,
            kb: 8192,
            functions: "vfs_read".to_owned(),
        };
        boot.ring = Some(ring.clone());
        let takes = "it is booted with what that takes: calls of vfs_read go to the";
        let (what, mend) = said(&boot, &domain("", ""));
        let global = format!("{takes} global ring buffer (8192 KiB for each CPU)");
        assert_eq!((what, mend), (global, String::new()));
        ring.instance = Some("xf".to_owned());
        ring.reserved = true;
        boot.ring = Some(ring);
        let (what, _) = said(&boot, &domain("", ""));
        let reserved = format!(
            "{takes} ring buffer of instance 'xf', in memory reserved at boot (8192 KiB for each \
             CPU)"
        );
        assert_eq!(what, reserved);
    }
}
