//! Writes the files of a package that follow from the command line's
//! definition: a man page for xftrace and one for each command, and the bash
//! completion.
//!
//! ```text
//! cargo run --example packaging-files -- OUTDIR
//! ```
//!
//! An example, and not a build script or a second program, so that neither the
//! library nor the installed command carries the generators.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Arg, Command, CommandFactory};
use clap_mangen::roff::{bold, roman, Roff};
use clap_mangen::Man;
use xftrace::cli::args::Cli;

/// The completion of domains, written by hand but for its three lists.
const DOMAINS: &str = include_str!("../packaging/domains.bash");

fn main() -> ExitCode {
    let Some(dir) = std::env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("usage: packaging-files OUTDIR");
        return ExitCode::from(2);
    };
    match man_pages(&dir).and_then(|()| completion(&dir)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cannot write below {}: {error}", dir.display());
            ExitCode::from(2)
        }
    }
}

/// The definition without `help`, which is no command with a page of its own,
/// and with the options for all commands at each of them.
fn definition() -> Command {
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    command
}

fn visible(command: &Command) -> impl Iterator<Item = &Command> {
    command.get_subcommands().filter(|sub| !sub.is_hide_set())
}

/// Writes the pages, `xftrace.1` and `xftrace-COMMAND.1`.
fn man_pages(dir: &Path) -> io::Result<()> {
    let man = dir.join("man");
    fs::create_dir_all(&man)?;
    let top = definition();
    let help = long_help(&top);
    let pages: Vec<String> = visible(&top).map(page_name).collect();
    let mut also = pages.clone();
    also.extend(["virsh", "trace-cmd"].map(str::to_owned));
    page(&man, &top, "xftrace", &help, &also)?;

    let status: Vec<Section> = help
        .into_iter()
        .filter(|section| section.heading == "Exit status")
        .collect();
    for sub in visible(&top) {
        let mut sections = long_help(sub);
        if !sections
            .iter()
            .any(|section| section.heading == "Exit status")
        {
            sections.extend(status.iter().cloned());
        }
        let mut also = vec!["xftrace".to_owned()];
        also.extend(
            pages
                .iter()
                .filter(|page| **page != page_name(sub))
                .cloned(),
        );
        page(&man, sub, &page_name(sub), &sections, &also)?;
        // What `xftrace symbols add` is, besides `xftrace symbols`.
        for below in visible(sub) {
            let name = format!("{}-{}", page_name(sub), below.get_name());
            page(&man, below, &name, &status, &[page_name(sub)])?;
        }
    }
    Ok(())
}

fn page_name(sub: &Command) -> String {
    format!("xftrace-{}", sub.get_name())
}

/// What a command does that has commands of its own: they have no pages.
fn actions(command: &Command, roff: &mut Roff) {
    for (number, action) in visible(command).enumerate() {
        if number == 0 {
            roff.control("SH", ["ACTIONS"]);
        }
        let mut line = vec![action.get_name().to_owned()];
        line.extend(action.get_positionals().map(Arg::to_string));
        roff.control("TP", []);
        roff.text([bold(line.join(" "))]);
        let about = action.get_about().map(ToString::to_string);
        roff.text([roman(about.unwrap_or_default())]);
    }
}

/// One page, in the order of man-pages(7).
fn page(
    dir: &Path,
    command: &Command,
    name: &str,
    help: &[Section],
    also: &[String],
) -> io::Result<()> {
    let man = Man::new(command.clone())
        .title(name.to_uppercase())
        .source(concat!("xftrace ", env!("CARGO_PKG_VERSION")))
        .manual("User Commands");
    let mut out = Vec::new();
    man.render_title(&mut out)?;
    man.render_name_section(&mut out)?;
    man.render_synopsis_section(&mut out)?;
    man.render_description_section(&mut out)?;
    man.render_options_section(&mut out)?;
    let mut roff = Roff::new();
    if name == "xftrace" {
        man.render_subcommands_section(&mut out)?;
    } else {
        actions(command, &mut roff);
    }

    for (title, of) in [
        ("NAMES", "Names"),
        ("EXIT STATUS", "Exit status"),
        ("ENVIRONMENT", "Environment"),
        ("FILES", "Files"),
    ] {
        let sections = help.iter().filter(|section| section.heading == of);
        for section in sections {
            roff.control("SH", [title]);
            section.as_list(&mut roff);
        }
    }
    let known = ["Names", "Exit status", "Environment", "Files"];
    let examples = help
        .iter()
        .filter(|section| !known.contains(&section.heading.as_str()));
    for (number, section) in examples.enumerate() {
        if number == 0 {
            roff.control("SH", ["EXAMPLES"]);
        }
        if section.heading != "Examples" {
            roff.control("PP", []);
            roff.text([roman(format!("{}:", section.heading))]);
        }
        section.as_example(&mut roff);
    }
    roff.control("SH", ["SEE ALSO"]);
    for (number, page) in also.iter().enumerate() {
        let end = if number + 1 == also.len() { "" } else { "," };
        roff.text([bold(page), roman(format!("(1){end}"))]);
    }
    roff.to_writer(&mut out)?;
    fs::write(dir.join(format!("{name}.1")), out)
}

/// A part of the long help: a line that ends with a colon, and the indented
/// lines below it.
#[derive(Clone)]
struct Section {
    heading: String,
    lines: Vec<String>,
}

/// The parts of what stands below a command's options in its long help.
fn long_help(command: &Command) -> Vec<Section> {
    let text = command
        .get_after_long_help()
        .map(ToString::to_string)
        .unwrap_or_default();
    let mut sections: Vec<Section> = Vec::new();
    for line in text.lines() {
        match (line.strip_prefix("  "), sections.last_mut()) {
            (Some(line), Some(section)) => section.lines.push(line.to_owned()),
            (None, _) if !line.trim().is_empty() => sections.push(Section {
                heading: line.trim_end_matches(':').to_owned(),
                lines: Vec::new(),
            }),
            _ => {}
        }
    }
    sections
}

impl Section {
    /// Lines of two columns as a list, others as running text.
    fn as_list(&self, roff: &mut Roff) {
        for line in &self.lines {
            match line.split_once("  ") {
                Some((term, text)) => {
                    roff.control("TP", []);
                    roff.text([bold(term)]);
                    roff.text([roman(text.trim_start())]);
                }
                None => {
                    roff.text([roman(line)]);
                }
            }
        }
    }

    /// The lines as they stand.
    fn as_example(&self, roff: &mut Roff) {
        roff.control("PP", []);
        roff.control("RS", ["4"]);
        roff.control("nf", []);
        for line in &self.lines {
            roff.text([roman(line)]);
        }
        roff.control("fi", []);
        roff.control("RE", []);
    }
}

/// Writes the bash completion: what clap_complete makes of the definition, and
/// around it the completion of domains, which only libvirt can name.
fn completion(dir: &Path) -> io::Result<()> {
    // clap_complete offers hidden commands as well: hook and helper, which are
    // not for people.
    let all = Cli::command();
    let mut command = Command::new("xftrace")
        .args(all.get_arguments().cloned())
        .subcommands(visible(&all).cloned())
        .version(env!("CARGO_PKG_VERSION"));
    let mut generated = Vec::new();
    clap_complete::generate(
        clap_complete::Shell::Bash,
        &mut command,
        "xftrace",
        &mut generated,
    );

    let top = definition();
    let mut with_domain = Vec::new();
    let mut domain_options = Vec::new();
    let mut value_options = Vec::new();
    for sub in visible(&top) {
        for arg in sub.get_arguments() {
            let is_domain = value_names(arg).any(|name| name == "DOMAIN");
            if arg.is_positional() {
                if is_domain {
                    with_domain.push(sub.get_name().to_owned());
                }
            } else if is_domain {
                domain_options.extend(spellings(arg));
            } else if arg.get_action().takes_values() {
                value_options.extend(spellings(arg));
            }
        }
    }
    for list in [&mut domain_options, &mut value_options] {
        list.sort();
        list.dedup();
    }

    let mut out = fs::File::create(dir.join("xftrace.bash"))?;
    out.write_all(&generated)?;
    let domains = DOMAINS
        .replace("@DOMAIN_OPTIONS@", &domain_options.join(" | "))
        .replace("@VALUE_OPTIONS@", &value_options.join(" | "))
        .replace("@DOMAIN_COMMANDS@", &with_domain.join(" | "));
    out.write_all(domains.as_bytes())
}

fn value_names(arg: &Arg) -> impl Iterator<Item = &str> {
    arg.get_value_names()
        .unwrap_or_default()
        .iter()
        .map(|name| name.as_str())
}

/// `-d` and `--domain`.
fn spellings(arg: &Arg) -> Vec<String> {
    let short = arg.get_short().map(|short| format!("-{short}"));
    let long = arg.get_long().map(|long| format!("--{long}"));
    short.into_iter().chain(long).collect()
}
