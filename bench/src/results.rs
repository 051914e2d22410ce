//! What was measured, as it is kept in a file: every run of every section, so that a run can go on where another stopped, and
//! all tables and verdicts are made from it.

use super::stats::Spread;
use anyhow::Context;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// One run of one subject.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Sample {
    /// What it was under, such as a layout of the table.
    pub case: String,
    /// What was measured: ours, or what stands against it.
    pub subject: String,
    /// Runs of one round followed each other, so they are compared.
    pub round: u32,
    /// By name: seconds, rows, buffers, ...
    pub values: BTreeMap<String, f64>,
}

impl Sample {
    pub fn new<const N: usize>(case: &str, subject: &str, round: u32, values: [(&str, f64); N]) -> Sample {
        let values = values.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        Sample { case: case.into(), subject: subject.into(), round, values }
    }
}

/// A section on one server, whole.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Part {
    /// With other options it is measured again.
    pub options: Value,
    /// How long it took.
    pub seconds: f64,
    pub samples: Samples,
}

#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Samples(pub Vec<Sample>);

impl Samples {
    pub fn push(&mut self, sample: Sample) {
        self.0.push(sample);
    }

    /// Cases, in the order of their first samples.
    pub fn cases(&self) -> Vec<&str> {
        in_order(self.0.iter().map(|sample| sample.case.as_str()))
    }

    /// Subjects of a case, in the order of their first samples.
    pub fn subjects(&self, case: &str) -> Vec<&str> {
        in_order(self.0.iter().filter(|sample| sample.case == case).map(|sample| sample.subject.as_str()))
    }

    /// A value by rounds. The value `a/b` is a quotient of two.
    pub fn rounds(&self, case: &str, subject: &str, name: &str) -> BTreeMap<u32, f64> {
        let ours = self.0.iter().filter(|sample| sample.case == case && sample.subject == subject);
        ours.filter_map(|sample| {
            let value = |name: &str| sample.values.get(name).copied();
            let value = match name.split_once('/') {
                Some((over, under)) => value(over)? / value(under)?,
                None => value(name)?,
            };
            Some((sample.round, value))
        })
        .collect()
    }

    /// A value in all rounds.
    pub fn spread(&self, case: &str, subject: &str, name: &str) -> Option<Spread> {
        Spread::of(&self.rounds(case, subject, name).into_values().collect::<Vec<_>>())
    }

    /// A value against the same of another subject or case, round by round.
    pub fn ratio(&self, (case, subject): (&str, &str), against: (&str, &str), name: &str) -> Option<Spread> {
        let against = self.rounds(against.0, against.1, name);
        let ours = self.rounds(case, subject, name);
        let ratios = ours.iter().filter_map(|(round, value)| Some(value / against.get(round)?));
        Spread::of(&ratios.collect::<Vec<_>>())
    }
}

fn in_order<'a>(names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut found: Vec<&str> = vec![];
    for name in names {
        if !found.contains(&name) {
            found.push(name);
        }
    }
    found
}

/// All of one machine.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Results {
    /// What it was measured on, by name.
    pub machine: BTreeMap<String, String>,
    /// By major version, then by section.
    pub servers: BTreeMap<String, BTreeMap<String, Part>>,
}

/// The results and their file.
pub struct Store {
    pub path: PathBuf,
    pub results: Results,
}

impl Store {
    /// What the file holds, or nothing yet.
    pub fn open(path: &Path, afresh: bool) -> anyhow::Result<Store> {
        let results = if path.exists() && !afresh { read(path)? } else { Results::default() };
        Ok(Store { path: path.to_owned(), results })
    }

    /// Whether a section was measured with these options.
    pub fn has(&self, server: &str, section: &str, options: &Value) -> bool {
        let part = self.results.servers.get(server).and_then(|parts| parts.get(section));
        part.is_some_and(|part| part.options == *options)
    }

    /// Keeps a section that was measured whole.
    pub fn keep(&mut self, server: &str, section: &str, part: Part) -> anyhow::Result<()> {
        self.results.servers.entry(server.into()).or_default().insert(section.into(), part);
        let folder = self.path.parent().context("the results need a folder")?;
        let unfinished = self.path.with_extension("unfinished");
        let text = serde_json::to_string_pretty(&self.results)? + "\n";
        let written = fs::create_dir_all(folder).and_then(|()| fs::write(&unfinished, text));
        written.and_then(|()| fs::rename(&unfinished, &self.path)).with_context(|| self.path.display().to_string())
    }
}

/// Reads a file of results.
pub fn read(path: &Path) -> anyhow::Result<Results> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    serde_json::from_str(&text).with_context(|| format!("{} holds no results of this program", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples() -> Samples {
        let mut samples = Samples::default();
        for (round, ours, theirs) in [(0, 4.0, 8.0), (1, 2.0, 2.0), (2, 3.0, 4.0)] {
            samples.push(Sample::new("block", "ours", round, [("rows", 12.0), ("seconds", ours)]));
            samples.push(Sample::new("block", "theirs", round, [("rows", 12.0), ("seconds", theirs)]));
        }
        // Measured in the first round alone.
        samples.push(Sample::new("block", "slow", 0, [("rows", 1.0), ("seconds", 60.0)]));
        samples
    }

    #[test]
    fn runs_are_compared_within_their_round() {
        let ratio = |against| samples().ratio(("block", "ours"), ("block", against), "rows/seconds");
        assert_eq!(ratio("theirs"), Some(Spread { median: 4.0 / 3.0, min: 1.0, max: 2.0 }));
        assert_eq!(ratio("slow"), Some(Spread { median: 180.0, min: 180.0, max: 180.0 }));
        assert_eq!(ratio("nobody"), None);
        assert_eq!(samples().subjects("block"), ["ours", "theirs", "slow"]);
    }

    #[test]
    fn what_is_measured_is_kept_and_found_again_with_the_same_options() {
        let folder = std::env::temp_dir().join(format!("results-{}", support::random_hex()));
        let path = folder.join("results.json");
        let mut store = Store::open(&path, false).unwrap();
        let options = serde_json::json!({ "rows": 5 });
        store.keep("15", "drain", Part { options: options.clone(), seconds: 1.5, samples: samples() }).unwrap();
        let store = Store::open(&path, false).unwrap();
        assert_eq!(store.results.servers["15"]["drain"].samples, samples());
        assert!(store.has("15", "drain", &options));
        assert!(!store.has("15", "drain", &serde_json::json!({ "rows": 6 })));
        assert!(!store.has("13", "drain", &options) && !store.has("15", "idle", &options));
        assert!(Store::open(&path, true).unwrap().results.servers.is_empty());
        fs::remove_dir_all(folder).unwrap();
    }
}
