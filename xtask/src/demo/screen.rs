//! What the demo shows: headings, commands as a user would type them, what they say, and what was checked.

use anyhow::ensure;
use std::process::Command;
use support::process::output;

pub struct Screen {
    step: u32,
}

impl Screen {
    pub fn new() -> Screen {
        Screen { step: 0 }
    }

    pub fn heading(&mut self, text: &str) {
        self.step += 1;
        println!("\n{}. {text}", self.step);
    }

    /// Something that is done here, with the command that does the same.
    pub fn command(&self, command: &str) {
        println!("   $ {command}");
    }

    pub fn say(&self, text: &str) {
        for line in text.lines() {
            println!("   {line}");
        }
    }

    /// Shows and runs a command that has no secrets in it; what it says is the answer, and is not shown.
    pub fn run(&self, program: &mut Command, arguments: &[&str]) -> anyhow::Result<String> {
        let name = program.get_program().to_owned();
        let name = std::path::Path::new(&name).file_name().unwrap_or(&name).display().to_string();
        let words = arguments
            .iter()
            .map(|word| if word.contains([' ', '{']) { format!(" '{word}'") } else { format!(" {word}") });
        self.command(&format!("{name}{}", words.collect::<String>()));
        output(program.args(arguments))
    }

    /// A claim and what it was checked by. A claim that does not hold ends the demo.
    pub fn check(&self, claim: &str, found: impl PartialEq + ToString, expected: impl ToString) -> anyhow::Result<()> {
        let (found, expected) = (found.to_string(), expected.to_string());
        ensure!(found == expected, "{claim}: expected {expected}, found {found}");
        println!("   ok  {claim}: {found}");
        Ok(())
    }
}

/// One table of what kubectl says again and again, each time with widths of its own.
#[derive(Default)]
pub struct Rows {
    /// Of the first answer, with its heading.
    widths: Vec<usize>,
}

impl Rows {
    /// What is new in the answer, under the first one.
    pub fn add(&mut self, answer: &str) -> String {
        let first = self.widths.is_empty();
        let cells = |line: &str| {
            let cells = line.split("  ").map(|cell| cell.trim().to_owned()).filter(|cell| !cell.is_empty());
            cells.collect::<Vec<_>>()
        };
        let lines: Vec<Vec<String>> = answer.lines().map(cells).collect();
        if first {
            let columns = lines.iter().map(Vec::len).max().unwrap_or_default();
            let width = |column| lines.iter().filter_map(|line| line.get(column)).map(String::len).max();
            self.widths = (0..columns).map(|column| width(column).unwrap_or_default()).collect();
        }
        let row = |line: &Vec<String>| {
            let cells = line.iter().zip(&self.widths).map(|(cell, width)| format!("{cell:width$}   "));
            cells.collect::<String>().trim_end().to_owned()
        };
        lines.iter().skip(usize::from(!first)).map(row).collect::<Vec<_>>().join("\n")
    }
}
