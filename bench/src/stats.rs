//! Numbers of many runs made one: medians, percentiles, spreads. Pure.

use std::fmt::{self, Display};

/// The middle of several runs, and how far they lay apart.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

impl Spread {
    /// None: of nothing.
    pub fn of(values: &[f64]) -> Option<Spread> {
        let (min, max) = (percentile(values, 0.0)?, percentile(values, 100.0)?);
        Some(Spread { median: median(values)?, min, max })
    }
}

impl Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.min == self.max {
            return f.write_str(&number(self.median));
        }
        write!(f, "{} ({}..{})", number(self.median), number(self.min), number(self.max))
    }
}

/// The middle value, or the mean of the two in the middle. None: of nothing.
pub fn median(values: &[f64]) -> Option<f64> {
    let sorted = sorted(values);
    let (upper, even) = (sorted.len() / 2, sorted.len().is_multiple_of(2));
    let upper_value = *sorted.get(upper)?;
    Some(if even { f64::midpoint(sorted[upper - 1], upper_value) } else { upper_value })
}

/// The smallest value that so many percent of all are not above (nearest rank). None: of nothing.
pub fn percentile(values: &[f64], percent: f64) -> Option<f64> {
    let sorted = sorted(values);
    let rank = (percent / 100.0 * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied()
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

/// The value that so many percent of all are not above, from a histogram: upper bounds of buckets, rising, and how many values
/// are not above each. As Prometheus does it, values are taken to lie evenly in a bucket. None: of nothing, or in the last, open
/// bucket.
pub fn histogram_percentile(buckets: &[(f64, f64)], percent: f64) -> Option<f64> {
    let rank = buckets.last().map(|(_, count)| count * percent / 100.0).filter(|rank| *rank > 0.0)?;
    let index = buckets.iter().position(|(_, count)| *count >= rank)?;
    let (bound, count) = buckets[index];
    let (below, before) = index.checked_sub(1).map_or((0.0, 0.0), |index| buckets[index]);
    bound.is_finite().then(|| below + (bound - below) * (rank - before) / (count - before))
}

/// A number as short as it still tells something: three digits, and thousands with blanks.
pub fn number(value: f64) -> String {
    let digits = match value.abs() {
        size if size >= 100.0 || size == 0.0 => 0,
        size if size >= 10.0 => 1,
        size if size >= 1.0 => 2,
        size if size >= 0.01 => 3,
        _ => 5,
    };
    let text = format!("{value:.digits$}");
    let (whole, rest) = text.split_at(text.find('.').unwrap_or(text.len()));
    // Counts are whole.
    let rest = if value.fract() == 0.0 { "" } else { rest };
    let (sign, whole) = whole.split_at(usize::from(value < 0.0));
    let grouped: Vec<&str> = whole.as_bytes().rchunks(3).rev().filter_map(|group| str::from_utf8(group).ok()).collect();
    format!("{sign}{}{rest}", grouped.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle_of_any_order() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn a_percentile_is_a_value_that_was_seen() {
        let values: Vec<f64> = (1..=200).rev().map(f64::from).collect();
        let found = [0.0, 50.0, 99.0, 100.0].map(|percent| percentile(&values, percent));
        assert_eq!(found, [1.0, 100.0, 198.0, 200.0].map(Some));
        assert_eq!(percentile(&[7.0], 99.0), Some(7.0));
        assert_eq!(percentile(&[], 50.0), None);
    }

    #[test]
    fn a_percentile_of_a_histogram_lies_in_its_bucket() {
        let buckets = [(0.1, 90.0), (0.5, 98.0), (1.0, 100.0), (f64::INFINITY, 100.0)];
        assert_eq!(histogram_percentile(&buckets, 45.0), Some(0.05));
        assert_eq!(histogram_percentile(&buckets, 99.0), Some(0.75));
        // Beyond the last bound nothing is known.
        assert_eq!(histogram_percentile(&[(1.0, 1.0), (f64::INFINITY, 2.0)], 99.0), None);
        assert_eq!(histogram_percentile(&[(1.0, 0.0), (f64::INFINITY, 0.0)], 99.0), None);
    }

    #[test]
    fn a_spread_is_read_in_three_digits() {
        let spread = Spread::of(&[1.25, 0.9, 1000.0]).unwrap();
        assert_eq!(spread.to_string(), "1.25 (0.900..1 000)");
        assert_eq!(Spread::of(&[2.0]).unwrap().to_string(), "2");
        assert_eq!(Spread::of(&[]), None);
        let shown = [0.0, 0.0006, 0.5678, 12.34, 61_234.5, 1_234_567.0, -1234.0].map(number);
        assert_eq!(shown, ["0", "0.00060", "0.568", "12.3", "61 234", "1 234 567", "-1 234"]);
    }
}
