//! What to type inside a guest that chooses its kernel itself, so that this kernel
//! boots with other parameters.

use crate::libvirt::shell_word;

/// Commands for a shell of root in the guest, a line each; typed again, they replace
/// what they did before.
///
/// GRUB's configuration is shell, and what it puts last on the command line is
/// GRUB_CMDLINE_LINUX_DEFAULT (util/grub.d/10_linux.in). The kernel takes the last value
/// of each of these parameters. So ours are put behind what is there, whatever that is
/// and however it is quoted, by a file of our own: Debian's grub-mkconfig reads
/// /etc/default/grub.d/*.cfg after /etc/default/grub. Where there is no update-grub,
/// grubby takes the place of both.
pub(super) fn commands(parameters: &str) -> String {
    let quoted: String = parameters.chars().flat_map(escaped).collect();
    let line = format!("GRUB_CMDLINE_LINUX_DEFAULT=\"$GRUB_CMDLINE_LINUX_DEFAULT {quoted}\"");
    format!(
        "mkdir -p /etc/default/grub.d && printf '%s\\n' {} > /etc/default/grub.d/xftrace.cfg    \
         (inside the guest, as root)\n\
         update-grub && reboot    (inside the guest too; where there is no update-grub, as on \
         Fedora, instead of both: grubby --update-kernel=ALL --remove-args='{OURS}' --args={} && \
         reboot)",
        shell_word(&line),
        shell_word(parameters)
    )
}

/// What xftrace has guests booted with, as grubby is told to remove it: memory that
/// somebody else reserved stays.
const OURS: &str = "ftrace=function_graph ftrace_graph_filter trace_buf_size \
    reserve_mem=24M:4096:xf trace_instance=xf@xf";

/// What undoes [`commands`] inside the guest.
pub(super) fn undo() -> String {
    format!(
        "rm /etc/default/grub.d/xftrace.cfg && update-grub && reboot    (inside the guest, as \
         root; where there is no update-grub: grubby --update-kernel=ALL --remove-args='{OURS}' \
         && reboot)"
    )
}

/// As it stands between double quotes of a shell.
fn escaped(c: char) -> impl Iterator<Item = char> {
    let escape = matches!(c, '$' | '`' | '"' | '\\').then_some('\\');
    escape.into_iter().chain(std::iter::once(c))
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::process::Command;

    use super::*;
    use crate::kernel::stock;

    const OLD: &str = "ftrace=function trace_buf_size=1M ftrace_graph_filter=old";
    const NEW: &str = "ftrace=function_graph ftrace_graph_filter=a.b,c$d trace_buf_size=8M";

    fn shell(command: &str) -> String {
        let output = Command::new("sh").args(["-ec", command]).output();
        let output = output.expect("a shell");
        assert!(output.status.success(), "{command}: {output:?}");
        String::from_utf8(output.stdout).expect("text")
    }

    /// What grub-mkconfig and 10_linux make of the files below `etc`.
    fn command_line(etc: &Path) -> String {
        let etc = etc.display();
        let both = "$GRUB_CMDLINE_LINUX ${GRUB_CMDLINE_LINUX_DEFAULT-}";
        shell(&format!(
            "GRUB_CMDLINE_LINUX=; . {etc}/default/grub; \
             for file in {etc}/default/grub.d/*.cfg; do . $file; done; printf %s \"{both}\""
        ))
    }

    /// Types the first command, about the files below `etc`.
    fn typed(parameters: &str, etc: &Path) {
        let said = commands(parameters);
        let (typed, _) = said.split_once("    (").expect("a command");
        shell(&typed.replace("/etc/", &format!("{}/", etc.display())));
    }

    #[test]
    fn typed_the_parameters_come_last_however_often_and_whatever_was_there() {
        for before in [
            "GRUB_CMDLINE_LINUX=\"quiet\"\n".to_owned(),
            format!("GRUB_CMDLINE_LINUX=\"{OLD}\"\nGRUB_CMDLINE_LINUX_DEFAULT=\"quiet {OLD}\"\n"),
            format!("GRUB_CMDLINE_LINUX_DEFAULT='{OLD} \"$x\"'\n"),
            "GRUB_CMDLINE_LINUX=quiet # \"\nGRUB_CMDLINE_LINUX_DEFAULT=nosmt".to_owned(),
            "  export GRUB_CMDLINE_LINUX_DEFAULT=\"a\\\nb\"\n".to_owned(),
            String::new(),
        ] {
            let dir = tempfile::tempdir().expect("a directory");
            let etc = dir.path();
            std::fs::create_dir_all(etc.join("default/grub.d")).expect("a directory");
            std::fs::write(etc.join("default/grub"), &before).expect("a file");
            std::fs::write(etc.join("default/grub.d/init.cfg"), "").expect("a file");
            let was = command_line(etc);
            for parameters in [NEW, OLD, NEW, NEW] {
                typed(parameters, etc);
                assert_eq!(command_line(etc), format!("{was} {parameters}"), "{before}");
            }
            let after = std::fs::read_to_string(etc.join("default/grub")).expect("a file");
            assert_eq!(after, before);
        }
    }

    #[test]
    fn where_there_is_no_such_directory_it_is_made() {
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::create_dir(dir.path().join("default")).expect("a directory");
        std::fs::write(dir.path().join("default/grub"), "").expect("a file");
        typed(NEW, dir.path());
        assert!(command_line(dir.path()).ends_with(NEW));
        let grubby = format!("--remove-args='{OURS}' --args='{NEW}' &&");
        assert!(commands(NEW).contains(&grubby));
    }

    /// Whichever ring it was booted with before, and nothing else.
    #[test]
    fn what_is_removed_is_all_that_was_put_there() {
        let ours: Vec<&str> = OURS.split(' ').collect();
        let (reserved, _) = stock::reserved_command_line(&["f"]);
        let global = stock::command_line(&["f"]);
        for parameter in global.split(' ').chain(reserved.split(' ')) {
            let (name, _) = parameter.split_once('=').expect("a value");
            assert!(
                ours.contains(&parameter) || ours.contains(&name),
                "{parameter}"
            );
        }
        assert!(!ours.contains(&"reserve_mem"));
    }
}
