//! Times, counts and foreign text in words, for the screens. Pure.

use chrono::{DateTime, SecondsFormat, Utc};

/// Text from elsewhere as one line that can only be read: control characters, and those that turn the direction of
/// text around, would let whoever wrote a trigger's message draw on the reader's terminal.
pub fn plain(text: &str) -> String {
    let steers = |c: char| {
        c.is_control()
            || matches!(c, '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
    };
    let text: String = text.chars().map(|c| if steers(c) { ' ' } else { c }).collect();
    text.split(' ').filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
}

/// A length of time as in kubectl's columns AGE: `45s`, `3m20s`, `7h`, `12d`.
pub fn length(seconds: i64) -> String {
    let two = |big: i64, unit: &str, small: i64, of: &str| match small {
        0 => format!("{big}{unit}"),
        small => format!("{big}{unit}{small}{of}"),
    };
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match seconds {
        ..0 => "0s".into(),
        0..120 => format!("{seconds}s"),
        120..600 => two(minutes, "m", seconds % 60, "s"),
        600..10_800 => format!("{minutes}m"),
        10_800..28_800 => two(hours, "h", minutes % 60, "m"),
        28_800..172_800 => format!("{hours}h"),
        172_800..691_200 => two(days, "d", hours % 24, "h"),
        691_200..63_072_000 => format!("{days}d"),
        _ => two(days / 365, "y", days % 365, "d"),
    }
}

/// How long ago something was. The operator's clock may be a little ahead of ours.
pub fn ago(now: DateTime<Utc>, then: DateTime<Utc>) -> String {
    match (now - then).num_seconds() {
        -5..=0 => "just now".into(),
        seconds @ ..-5 => format!("in {}, by this clock", length(-seconds)),
        seconds => format!("{} ago", length(seconds)),
    }
}

/// When something is due.
pub fn due(now: DateTime<Utc>, then: DateTime<Utc>) -> String {
    match (then - now).num_seconds() {
        seconds @ 1.. => format!("in {}", length(seconds)),
        0 => "now".into(),
        seconds => format!("{} overdue", length(-seconds)),
    }
}

/// A time for machines and other clocks.
pub fn exact(time: DateTime<Utc>) -> String {
    time.to_rfc3339_opts(SecondsFormat::Secs, true)
}

/// Milliseconds as a length: `80ms`, `2.3s`, `4m10s`.
pub fn took(milliseconds: i64) -> String {
    match milliseconds {
        ..1000 => format!("{}ms", milliseconds.max(0)),
        1000..60_000 => format!("{}.{}s", milliseconds / 1000, milliseconds % 1000 / 100),
        _ => length(milliseconds / 1000),
    }
}

/// A number with its thousands apart.
pub fn number(number: i64) -> String {
    let digits = number.unsigned_abs().to_string();
    let sign = if number < 0 { "-" } else { "" };
    let grouped = digits.char_indices().fold(String::new(), |mut text, (at, digit)| {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
        text
    });
    format!("{sign}{grouped}")
}

/// A number of things: `1 row`, `1,000 rows`.
pub fn count(count: i64, one: &str, many: &str) -> String {
    format!("{} {}", number(count), if count == 1 { one } else { many })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_those_of_kubectl() {
        let cases = [
            (-1, "0s"),
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (200, "3m20s"),
            (600, "10m"),
            (10_799, "179m"),
            (10_800, "3h"),
            (12_000, "3h20m"),
            (28_800, "8h"),
            (172_799, "47h"),
            (172_800, "2d"),
            (176_400, "2d1h"),
            (691_200, "8d"),
            (63_072_000, "2y"),
            (63_158_400, "2y1d"),
        ];
        for (seconds, text) in cases {
            assert_eq!(length(seconds), text, "{seconds}");
        }
        assert_eq!([took(-3), took(80), took(2345), took(250_000)], ["0ms", "80ms", "2.3s", "4m10s"]);
    }

    #[test]
    fn times_are_told_from_now() {
        let at = |second: i64| DateTime::from_timestamp(1_000_000 + second, 0).unwrap();
        let (past, close, future) = (ago(at(0), at(-200)), ago(at(0), at(4)), ago(at(0), at(40)));
        assert_eq!([past, close, future], ["3m20s ago", "just now", "in 40s, by this clock"]);
        assert_eq!([due(at(0), at(420)), due(at(0), at(0)), due(at(0), at(-20))], ["in 7m", "now", "20s overdue"]);
        assert_eq!(exact(at(0)), "1970-01-12T13:46:40Z");
        // The ends of the calendar.
        assert!(ago(DateTime::<Utc>::MAX_UTC, DateTime::<Utc>::MIN_UTC).ends_with("d ago"));
    }

    #[test]
    fn numbers_have_their_thousands_apart() {
        let numbers = [0, 999, 1000, 1_234_567, -1000, i64::MAX, i64::MIN].map(number);
        let texts = ["0", "999", "1,000", "1,234,567", "-1,000"];
        assert_eq!(numbers[..5], texts);
        assert_eq!(numbers[5..], ["9,223,372,036,854,775,807", "-9,223,372,036,854,775,808"]);
        assert_eq!([count(1, "row", "rows"), count(0, "row", "rows")], ["1 row", "0 rows"]);
    }

    #[test]
    fn foreign_text_cannot_steer_a_terminal() {
        let evil = "bad\u{1b}[2J\u{1b}]0;title\u{7}\r\nrow\u{9b}31m\u{7f} \u{202e}txt\u{2066}\u{200b}  ä😀";
        assert_eq!(plain(evil), "bad [2J ]0;title row 31m txt ä😀");
        assert!(
            (0..0x11_0000).filter_map(char::from_u32).all(|c| !plain(&format!("a{c}b")).contains(char::is_control))
        );
    }
}
