//! Numbers, times and foreign text as people read them.

use std::borrow::Cow;
use std::time::{SystemTime, UNIX_EPOCH};

/// Bytes in binary units, GiB the largest.
///
/// ```
/// assert_eq!(ramtorch_client::ui::text::bytes(3 << 29), "1.50 GiB");
/// ```
pub fn bytes(n: u64) -> String {
    const UNITS: [(u64, &str); 2] = [(1 << 30, "GiB"), (1 << 20, "MiB")];
    match UNITS.iter().find(|(size, _)| n >= *size) {
        Some((size, unit)) => format!("{:.2} {unit}", n as f64 / *size as f64),
        None if n >= 1 << 10 => format!("{:.1} KiB", n as f64 / 1024.0),
        None => format!("{n} B"),
    }
}

/// Bytes in GiB, for columns that compare sizes of memory.
pub fn gib(n: u64) -> String {
    format!("{:.2} GiB", n as f64 / (1u64 << 30) as f64)
}

/// A number of things with three significant digits: `999`, `12.3k`, `1.24M`, `8.03B`.
pub fn count(n: u64) -> String {
    const UNITS: [(f64, &str); 4] = [(1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")];
    let x = n as f64;
    // 0.9995 and not 1: what rounds to 1000k is shown as 1.00M.
    match UNITS.iter().find(|(size, _)| n >= 1000 && x >= size * 0.9995) {
        Some((size, unit)) => {
            let scaled = x / size;
            let decimals = if scaled >= 99.95 {
                0
            } else if scaled >= 9.995 {
                1
            } else {
                2
            };
            format!("{scaled:.decimals$}{unit}")
        }
        None => n.to_string(),
    }
}

/// A rate with three significant digits; `-` where it is not known.
pub fn rate(per_second: f64) -> String {
    match per_second {
        x if !x.is_finite() || x <= 0.0 => "-".to_owned(),
        x if x < 9.95 => format!("{x:.1}"),
        x => count(x.round() as u64),
    }
}

/// A duration: `420ms`, `12s`, `3m 05s`, `2h 04m`, `3d 04h`; `-` where it is not known.
pub fn duration(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "-".to_owned();
    }
    if seconds < 0.9995 {
        return format!("{:.0}ms", seconds * 1e3);
    }
    let whole = seconds.round() as u64;
    match whole {
        0..60 => format!("{whole}s"),
        60..3600 => format!("{}m {:02}s", whole / 60, whole % 60),
        3600..86400 => format!("{}h {:02}m", whole / 3600, whole % 3600 / 60),
        _ => format!("{}d {:02}h", whole / 86400, whole % 86400 / 3600),
    }
}

/// A loss or a statistic: four decimals, or an exponent where those would say little.
pub fn real(x: f64) -> String {
    match x.abs() {
        _ if x.is_nan() => "nan".to_owned(),
        a if a.is_infinite() => if x > 0.0 { "inf" } else { "-inf" }.to_owned(),
        a if a == 0.0 || (1e-3..1e5).contains(&a) => format!("{x:.4}"),
        _ => format!("{x:.3e}"),
    }
}

/// Milliseconds since 1970, now; 0 on a clock before that.
pub fn now_unix_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| i64::try_from(d.as_millis()).unwrap_or(i64::MAX))
}

/// Seconds from one time to another, both in milliseconds since 1970; `None` where one is not set.
pub fn seconds_between(from_unix_ms: i64, to_unix_ms: i64) -> Option<f64> {
    (from_unix_ms > 0 && to_unix_ms > 0).then(|| to_unix_ms.saturating_sub(from_unix_ms).max(0) as f64 / 1e3)
}

/// Milliseconds since 1970 as `2026-11-22 07:10:03 UTC`; `-` where not set or beyond the year 9999.
pub fn timestamp(unix_ms: i64) -> String {
    const LAST_MS: i64 = 253_402_300_799_999;
    if unix_ms <= 0 || unix_ms > LAST_MS {
        return "-".to_owned();
    }
    let seconds = unix_ms / 1000;
    let (days, second_of_day) = (seconds / 86400, seconds % 86400);
    // Days to civil date in the proleptic Gregorian calendar, counted in 400-year eras from 1 March of year 0.
    let z = days + 719_468;
    let (era, day_of_era) = (z / 146_097, z % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (h, m, s) = (second_of_day / 3600, second_of_day / 60 % 60, second_of_day % 60);
    format!("{year:04}-{month:02}-{day:02} {h:02}:{m:02}:{s:02} UTC")
}

/// Text from elsewhere (a model, a log, a job's name), made safe for a terminal: control characters other than
/// newline and tab become `�`, so that nothing moves the cursor or sets the title.
pub fn printable(text: &str) -> Cow<'_, str> {
    let bad = |c: char| c.is_control() && c != '\n' && c != '\t';
    if text.contains(bad) { Cow::Owned(text.replace(bad, "\u{fffd}")) } else { Cow::Borrowed(text) }
}

/// [`printable`], on one line: runs of white space become one space.
pub fn one_line(text: &str) -> String {
    printable(&text.split_whitespace().collect::<Vec<_>>().join(" ")).into_owned()
}

/// `1 step`, `2 steps`.
pub fn plural(n: u64, noun: &str) -> String {
    format!("{n} {noun}{}", if n == 1 { "" } else { "s" })
}

/// Every line of `text` behind `margin`.
pub fn indent(text: &str, margin: &str) -> String {
    text.lines().map(|line| format!("{margin}{line}").trim_end().to_owned()).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes() {
        let cases =
            [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 20, "5.00 MiB"), (1 << 30, "1.00 GiB"), (1 << 40, "1024.00 GiB")];
        for (n, text) in cases {
            assert_eq!(bytes(n), text);
        }
        assert_eq!(gib(1 << 29), "0.50 GiB");
    }

    #[test]
    fn counts_keep_three_digits() {
        let cases = [(0, "0"), (999, "999"), (1000, "1.00k"), (9_994, "9.99k"), (9_996, "10.0k"), (15_234, "15.2k"), (999_499, "999k")];
        for (n, text) in cases {
            assert_eq!(count(n), text);
        }
        assert_eq!(count(999_600), "1.00M");
        assert_eq!(count(8_030_261_248), "8.03B");
        assert_eq!(rate(0.25), "0.2");
        assert_eq!(rate(15_234.4), "15.2k");
        assert_eq!(rate(f64::NAN), "-");
    }

    #[test]
    fn durations() {
        let cases = [(0.42, "420ms"), (0.9996, "1s"), (59.4, "59s"), (59.6, "1m 00s"), (185.0, "3m 05s"), (7440.0, "2h 04m")];
        for (s, text) in cases {
            assert_eq!(duration(s), text);
        }
        assert_eq!(duration(3.0 * 86400.0 + 4.0 * 3600.0), "3d 04h");
        assert_eq!(duration(-1.0), "-");
        assert_eq!(duration(f64::INFINITY), "-");
    }

    #[test]
    fn dates() {
        assert_eq!(timestamp(1_000), "1970-01-01 00:00:01 UTC");
        assert_eq!(timestamp(951_782_400_000), "2000-02-29 00:00:00 UTC");
        assert_eq!(timestamp(1_795_331_403_000), "2026-11-22 07:10:03 UTC");
        assert_eq!(timestamp(253_402_300_799_999), "9999-12-31 23:59:59 UTC");
        assert_eq!(timestamp(0), "-");
    }

    #[test]
    fn escape_sequences_do_not_reach_the_terminal() {
        assert_eq!(printable("a\x1b[2Jb\n\tc\r"), "a\u{fffd}[2Jb\n\tc\u{fffd}");
        assert_eq!(one_line("a\n  b\x07"), "a b\u{fffd}");
    }

    proptest! {
        #[test]
        fn nothing_panics_and_nothing_is_empty(n: u64, x: f64, ms: i64, other: i64, text: String) {
            prop_assert!(!bytes(n).is_empty() && !count(n).is_empty() && !real(x).is_empty());
            prop_assert!(!rate(x).is_empty() && !duration(x).is_empty() && !timestamp(ms).is_empty());
            prop_assert!(seconds_between(ms, other).is_none_or(|s| s >= 0.0));
            prop_assert!(!one_line(&text).contains('\n'));
        }
    }
}
