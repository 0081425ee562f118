//! The table of supported guests, tests/lab/kernels.toml.
//!
//! It is read twice: the end-to-end tests have one test a row, whose domain is
//! made of it, and README.md's table is written from it. So what is promised is
//! what is tested.

use std::fmt::Write as _;

use anyhow::{bail, Context, Result};
use serde::Deserialize;

use crate::domain::{Backing, Domain};

/// The table, as it is built into the program that asks.
const TABLE: &str = include_str!("../kernels.toml");

/// One supported guest.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Row {
    /// Names the row, its domain and its test.
    pub name: String,
    /// What its test shows.
    pub shows: Shows,
    /// See [`Domain::kernel`].
    pub kernel: String,
    /// Which of the guest's rings is read.
    #[serde(default)]
    pub ring: Ring,
    /// See [`Domain::machine`].
    #[serde(default = "pc")]
    pub machine: String,
    /// See [`Domain::cpu`].
    #[serde(default = "max")]
    pub cpu: String,
    /// See [`Domain::vcpus`].
    #[serde(default = "two")]
    pub vcpus: u32,
    /// In MiB.
    #[serde(default = "small")]
    pub memory: u64,
    /// See [`Domain::cells`].
    #[serde(default)]
    pub cells: u32,
    /// What its memory is.
    pub backing: Backing,
    /// What happens to it while it is traced.
    #[serde(default)]
    pub meanwhile: Meanwhile,
}

/// What the test of a row shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Shows {
    /// Each call of a program that is known is recorded once, none is lost or
    /// forged, and QEMU is never stopped.
    EveryCall,
    /// The trace that is read from the host is, line by line, the one that the
    /// guest itself shows.
    SameLines,
}

/// A ring that a kernel without the patch is read by.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ring {
    /// The one that `trace` in the guest's tracefs shows.
    #[default]
    Global,
    /// That of an instance in memory that was reserved at boot.
    BootMapped,
}

/// What happens to a guest's memory while it is traced.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Meanwhile {
    /// Nothing.
    #[default]
    Nothing,
    /// A module is plugged in, and the ring comes to lie in it.
    Dimm,
    /// The balloon takes a quarter of it and gives it back.
    Balloon,
}

fn pc() -> String {
    "pc".to_owned()
}

fn max() -> String {
    "max".to_owned()
}

fn two() -> u32 {
    2
}

fn small() -> u64 {
    256
}

/// All rows, in the table's order.
///
/// # Errors
/// Where the table cannot be read, or two rows have one name.
pub fn rows() -> Result<Vec<Row>> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Table {
        guest: Vec<Row>,
    }
    let Table { guest: rows } = toml::from_str(TABLE).context("tests/lab/kernels.toml")?;
    let mut names: Vec<&str> = rows.iter().map(|row| row.name.as_str()).collect();
    names.sort_unstable();
    if let Some(twice) = names.windows(2).find(|two| two[0] == two[1]) {
        bail!("tests/lab/kernels.toml has two rows '{}'", twice[0]);
    }
    Ok(rows)
}

impl Row {
    /// The row of this name.
    ///
    /// # Errors
    /// Where there is none, or no table.
    pub fn named(name: &str) -> Result<Row> {
        let found = rows()?.into_iter().find(|row| row.name == name);
        found.with_context(|| format!("tests/lab/kernels.toml has no row '{name}'"))
    }

    /// The domain that it describes, with this behind its kernel's command line.
    #[must_use]
    pub fn domain(&self, append: &str) -> Domain {
        Domain {
            kernel: self.kernel.clone(),
            machine: self.machine.clone(),
            cpu: self.cpu.clone(),
            vcpus: self.vcpus,
            memory: self.memory,
            cells: self.cells,
            slots: u32::from(self.meanwhile == Meanwhile::Dimm),
            balloon: self.meanwhile == Meanwhile::Balloon,
            backing: self.backing,
            append: append.to_owned(),
            ..Domain::new(&self.name)
        }
    }
}

/// The table for people, in Markdown.
#[must_use]
pub fn markdown(rows: &[Row]) -> String {
    let mut text = "\
| guest kernel | mode | machine | memory | held as | shown | row |
| --- | --- | --- | --- | --- | --- | --- |
"
    .to_owned();
    for row in rows {
        // Writing into a String cannot fail.
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} | `{}` |",
            kernel(row),
            match is_stock(row) {
                true => "plain",
                false => "keyed",
            },
            machine(row),
            memory(row),
            match row.backing {
                Backing::Anon => "anonymous",
                Backing::File => "file",
                Backing::Private => "private file",
                Backing::Memfd => "memfd",
                Backing::Huge => "huge pages",
                Backing::HugeRetained => "huge pages, patched QEMU",
            },
            match row.shows {
                Shows::EveryCall => "every call once",
                Shows::SameLines => "the guest's own lines",
            },
            row.name,
        );
    }
    text
}

fn is_stock(row: &Row) -> bool {
    row.kernel.starts_with("stock-")
}

fn kernel(row: &Row) -> String {
    let Some((version, flavour)) = row
        .kernel
        .strip_prefix("stock-")
        .and_then(|name| name.split_once('-'))
    else {
        return format!("{} with the patch", row.kernel);
    };
    let ring = match row.ring {
        Ring::Global => "",
        Ring::BootMapped => ", boot-mapped ring",
    };
    format!("Debian {version} {flavour}{ring}")
}

fn machine(row: &Row) -> String {
    let levels = match row.cpu.as_str() {
        "max,-la57" => 4,
        _ => 5,
    };
    let plural = if row.vcpus == 1 { "" } else { "s" };
    let Row { machine, vcpus, .. } = row;
    format!("{machine}, {vcpus} CPU{plural}, {levels}-level paging")
}

fn memory(row: &Row) -> String {
    let size = match row.memory {
        mib if mib % 1024 == 0 => format!("{} GiB", mib / 1024),
        mib => format!("{mib} MiB"),
    };
    let cells = match row.cells {
        0 => String::new(),
        cells => format!(" in {cells} NUMA cells"),
    };
    let meanwhile = match row.meanwhile {
        Meanwhile::Nothing => "",
        Meanwhile::Dimm => ", a DIMM plugged in while traced",
        Meanwhile::Balloon => ", ballooned while traced",
    };
    format!("{size}{cells}{meanwhile}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_a_row_for_each_kernel_and_backing() {
        let rows = rows().unwrap();
        let kernels = [
            "6.1",
            "6.12",
            "stock-6.1-cloud",
            "stock-6.1-generic",
            "stock-6.12-cloud",
            "stock-6.12-generic",
        ];
        for kernel in kernels {
            let of: Vec<_> = rows.iter().filter(|row| row.kernel == kernel).collect();
            let wanted = match kernel.starts_with("stock-") {
                true => Shows::SameLines,
                false => Shows::EveryCall,
            };
            assert!(of.iter().any(|row| row.shows == wanted), "{kernel}");
        }
        use Backing::{Anon, File, Huge, HugeRetained, Memfd};
        for backing in [Anon, File, Memfd, Huge, HugeRetained] {
            let mut of = rows.iter().filter(|row| row.backing == backing);
            assert!(of.any(|row| row.shows == Shows::EveryCall), "{backing:?}");
        }
        // Private memory is refused, and so is no row.
        assert!(rows.iter().all(|row| row.backing != Backing::Private));
        for machine in ["pc", "q35"] {
            assert!(rows.iter().any(|row| row.machine == machine));
        }
        assert!(rows.iter().any(|row| row.ring == Ring::BootMapped));
    }
}
