//! Durations as the resource writes them: strings in the form of Gateway API's GEP-2257, such as `4h` or `1h30m`.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use kube::core::cel::Rule;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// The form of GEP-2257: at most four numbers of at most five digits, each with its unit.
const FORM: &str = "^([0-9]{1,5}(h|m|s|ms)){1,4}$";

/// The longest string that [`FORM`] allows, in characters.
const MAX_LENGTH: u32 = 28;

const UNITS: [(&str, u64); 4] = [("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)];

/// A length of time in whole milliseconds, written as in GEP-2257 (`10m`, `4h`, `1h30m`).
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Duration(std::time::Duration);

impl Duration {
    /// A duration of whole milliseconds.
    pub const fn from_millis(millis: u64) -> Self {
        Self(std::time::Duration::from_millis(millis))
    }

    /// A duration of whole minutes.
    pub const fn from_mins(mins: u64) -> Self {
        Self::from_millis(mins * 60_000)
    }

    /// The same length as the standard library's type.
    pub const fn as_std(self) -> std::time::Duration {
        self.0
    }

    /// Whole milliseconds. The form allows at most 4 x 99,999 h, which fits by far.
    pub fn as_millis(self) -> i64 {
        i64::try_from(self.0.as_millis()).unwrap_or(i64::MAX)
    }
}

/// A text that is not a duration in the form of GEP-2257.
#[derive(Debug, thiserror::Error)]
#[error("not a duration such as 4h or 1h30m (units are h, m, s and ms; days are not a unit: write 24h)")]
pub struct InvalidDuration;

impl FromStr for Duration {
    type Err = InvalidDuration;

    fn from_str(text: &str) -> Result<Self, InvalidDuration> {
        let mut rest = text;
        let mut millis = 0;
        for _ in 0..4 {
            let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
            if !(1..=5).contains(&digits) {
                return Err(InvalidDuration);
            }
            let (number, tail) = rest.split_at(digits);
            let letters = tail.bytes().take_while(u8::is_ascii_alphabetic).count();
            let (unit, tail) = tail.split_at(letters);
            let (_, scale) = UNITS.iter().find(|(name, _)| *name == unit).ok_or(InvalidDuration)?;
            millis += number.parse::<u64>().map_err(|_| InvalidDuration)? * scale;
            rest = tail;
            if rest.is_empty() {
                return Ok(Self::from_millis(millis));
            }
        }
        Err(InvalidDuration)
    }
}

impl fmt::Display for Duration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = self.0.as_millis();
        if rest == 0 {
            return f.write_str("0s");
        }
        for (unit, scale) in UNITS {
            let count = rest / u128::from(scale);
            rest %= u128::from(scale);
            if count > 0 {
                write!(f, "{count}{unit}")?;
            }
        }
        Ok(())
    }
}

impl Serialize for Duration {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Duration {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(|error| de::Error::custom(format!("{text:?} is {error}")))
    }
}

impl JsonSchema for Duration {
    fn schema_name() -> Cow<'static, str> {
        "Duration".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "maxLength": MAX_LENGTH })
    }
}

/// The one validation rule of a duration field: its form and its bounds, with one message for both.
pub fn between(least: &str, most: &str) -> Rule {
    Rule::new(format!(
        "self.matches('{FORM}') && duration(self) >= duration('{least}') && duration(self) <= duration('{most}')"
    ))
    .message(
        format!("must be a duration such as 4h or 1h30m, from {least} to {most} (days are not a unit: write 24h)")
            .as_str(),
    )
}

/// CEL: whether the duration field `a` is at most the field `b`; true where either has not the form of a duration,
/// since that is another rule's error.
pub fn at_most(a: &str, b: &str) -> String {
    format!("!self.{a}.matches('{FORM}') || !self.{b}.matches('{FORM}') || duration(self.{a}) <= duration(self.{b})")
}

#[cfg(test)]
mod tests {
    use super::Duration;

    #[test]
    fn reads_the_form_of_gep_2257_and_nothing_else() {
        for (text, millis) in [
            ("4h", 14_400_000),
            ("1h30m", 5_400_000),
            ("10m", 600_000),
            ("0s", 0),
            ("100ms", 100),
            ("30m1h", 5_400_000),
            ("99999h99999h99999h99999h", 4 * 99_999 * 3_600_000),
        ] {
            assert_eq!(text.parse::<Duration>().unwrap(), Duration::from_millis(millis), "{text}");
        }
        for text in
            ["", "4", "h", "4d", "1d12h", "4 h", "-4h", "1.5h", "100000h", "1h1h1h1h1h", "4H", "4hours", "4h ", "1µs"]
        {
            text.parse::<Duration>().unwrap_err();
        }
    }

    #[test]
    fn writes_the_shortest_form_that_reads_back() {
        for (text, short) in [("14400s", "4h"), ("90m", "1h30m"), ("600s", "10m"), ("1500ms", "1s500ms"), ("0h", "0s")]
        {
            let duration: Duration = text.parse().unwrap();
            assert_eq!(duration.to_string(), short);
            assert_eq!(short.parse::<Duration>().unwrap(), duration);
        }
    }
}
