//! What chat templates expect of Python: its `json.dumps`, `strftime`, and how it prints `True` and `None`.

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Error, ErrorKind, Output, State, escape_formatter};
use serde::Serialize;
use serde_json::ser::{CompactFormatter, Formatter, PrettyFormatter};
use std::io::{self, Write};

/// Prints a value as Jinja on Python does.
pub(crate) fn format_value(out: &mut Output, state: &State, value: &Value) -> Result<(), Error> {
    let literal = match value.kind() {
        ValueKind::Bool if value.is_true() => "True",
        ValueKind::Bool => "False",
        ValueKind::None => "None",
        _ => return escape_formatter(out, state, value),
    };
    out.write_str(literal).map_err(|_| Error::new(ErrorKind::WriteFailure, "out of memory"))
}

/// Whether Python could loop over the value; `none` is not iterable, an undefined one is.
pub(crate) fn is_iterable(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::String | ValueKind::Seq | ValueKind::Map | ValueKind::Iterable | ValueKind::Undefined)
}

/// Whether the value has a length and items.
pub(crate) fn is_sequence(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::String | ValueKind::Seq | ValueKind::Map)
}

/// `json.dumps(value, ensure_ascii=False, indent=…)`. Unlike Jinja's own filter it does not escape HTML.
pub(crate) fn tojson(value: Value, kwargs: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    let sort: Option<bool> = kwargs.get("sort_keys")?;
    let ascii: Option<bool> = kwargs.get("ensure_ascii")?;
    let separators: Option<Vec<String>> = kwargs.get("separators")?;
    kwargs.assert_all_used()?;
    let bad = |e: serde_json::Error| Error::new(ErrorKind::InvalidOperation, format!("tojson: {e}"));
    let mut json = serde_json::to_value(&value).map_err(bad)?;
    if sort == Some(true) {
        json.sort_all_objects();
    }
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(Error::new(ErrorKind::InvalidOperation, "tojson: separators must be two strings")),
        None => (if indent.is_some() { ",".into() } else { ", ".into() }, ": ".into()),
    };
    let indent = indent.map(|n| " ".repeat(n.min(64)));
    let inner = indent.as_ref().map(|i| PrettyFormatter::with_indent(i.as_bytes()));
    let mut out = Vec::new();
    let formatter = PythonFormatter { inner, item, key, ascii: ascii == Some(true) };
    json.serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter)).map_err(bad)?;
    let text = String::from_utf8(out).map_err(|_| Error::new(ErrorKind::InvalidOperation, "tojson: not UTF-8"))?;
    Ok(Value::from_safe_string(text))
}

/// Writes JSON with Python's separators.
struct PythonFormatter<'a> {
    /// Indents, where asked for.
    inner: Option<PrettyFormatter<'a>>,
    item: String,
    key: String,
    ascii: bool,
}

impl PythonFormatter<'_> {
    fn next<W: ?Sized + Write>(
        &mut self,
        w: &mut W,
        first: bool,
        begin: impl FnOnce(&mut PrettyFormatter, &mut dyn Write) -> io::Result<()>,
    ) -> io::Result<()> {
        if !first {
            w.write_all(self.item.as_bytes())?;
        }
        match &mut self.inner {
            // The separator is written above: to the inner formatter each element is a first one.
            Some(inner) => begin(inner, &mut Through(w)),
            None => Ok(()),
        }
    }
}

/// Makes an unsized writer into a sized one.
struct Through<'w, W: ?Sized>(&'w mut W);
impl<W: ?Sized + Write> Write for Through<'_, W> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.write(buf)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

macro_rules! pass {
    ($($name:ident),*) => {$(
        fn $name<W: ?Sized + Write>(&mut self, w: &mut W) -> io::Result<()> {
            match &mut self.inner {
                Some(inner) => inner.$name(w),
                None => CompactFormatter.$name(w),
            }
        }
    )*};
}

impl Formatter for PythonFormatter<'_> {
    pass!(begin_array, end_array, end_array_value, begin_object, end_object, end_object_value);

    fn begin_array_value<W: ?Sized + Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        self.next(w, first, |inner, mut w| inner.begin_array_value(&mut w, true))
    }
    fn begin_object_key<W: ?Sized + Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        self.next(w, first, |inner, mut w| inner.begin_object_key(&mut w, true))
    }
    fn begin_object_value<W: ?Sized + Write>(&mut self, w: &mut W) -> io::Result<()> {
        w.write_all(self.key.as_bytes())
    }
    fn write_string_fragment<W: ?Sized + Write>(&mut self, w: &mut W, fragment: &str) -> io::Result<()> {
        if !self.ascii {
            return w.write_all(fragment.as_bytes());
        }
        let mut units = [0; 2];
        for c in fragment.chars() {
            if c.is_ascii() {
                w.write_all(&[c as u8])?;
            } else {
                for unit in c.encode_utf16(&mut units) {
                    write!(w, "\\u{unit:04x}")?;
                }
            }
        }
        Ok(())
    }
}

const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
const MONTHS: [&str; 12] =
    ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December"];

/// C's `strftime` (English names) of a time in seconds since 1970, UTC.
pub(crate) fn strftime(format: &str, unix_seconds: i64) -> Result<String, Error> {
    let (days, second) = (unix_seconds.div_euclid(86_400), unix_seconds.rem_euclid(86_400));
    let (year, month, day) = civil(days);
    let day_of_year = days - days_of(year, 1, 1) + 1;
    let weekday = (days + 4).rem_euclid(7) as usize;
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let hour12 = (hour + 11) % 12 + 1;
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = chars.next();
        // `%-d` leaves out the padding.
        let plain = directive == Some('-');
        if plain {
            directive = chars.next();
        }
        let mut number =
            |value: i64, width: usize| if plain { out.push_str(&value.to_string()) } else { out.push_str(&format!("{value:0width$}")) };
        match directive {
            Some('Y') => number(year, 4),
            Some('y') => number(year.rem_euclid(100), 2),
            Some('m') => number(month, 2),
            Some('d') => number(day, 2),
            Some('H') => number(hour, 2),
            Some('I') => number(hour12, 2),
            Some('M') => number(minute, 2),
            Some('S') => number(second, 2),
            Some('j') => number(day_of_year, 3),
            Some('s') => number(unix_seconds, 1),
            Some('e') => out.push_str(&format!("{day:2}")),
            Some('F') => out.push_str(&format!("{year:04}-{month:02}-{day:02}")),
            Some('T') => out.push_str(&format!("{hour:02}:{minute:02}:{second:02}")),
            Some('A') => out.push_str(DAYS[weekday]),
            Some('a') => out.push_str(&DAYS[weekday][..3]),
            Some('B') => out.push_str(MONTHS[month as usize - 1]),
            Some('b' | 'h') => out.push_str(&MONTHS[month as usize - 1][..3]),
            Some('p') => out.push_str(if hour < 12 { "AM" } else { "PM" }),
            Some('Z') => out.push_str("UTC"),
            Some('z') => out.push_str("+0000"),
            Some('%') => out.push('%'),
            other => {
                let name = other.map(String::from).unwrap_or_default();
                return Err(Error::new(ErrorKind::InvalidOperation, format!("strftime_now: the directive %{name} is not supported")));
            }
        }
    }
    Ok(out)
}

/// Days since 1970 of a date in the Gregorian calendar.
fn days_of(year: i64, month: i64, day: i64) -> i64 {
    // Years begin in March here, so that the leap day is the last of its year.
    let y = if month <= 2 { year - 1 } else { year };
    let era = y.div_euclid(400);
    let year_of_era = y.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
}

/// Year, month and day of a number of days since 1970.
fn civil(days: i64) -> (i64, i64, i64) {
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let day_of_era = z.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let month = (shifted + 2) % 12 + 1;
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year, month, day_of_year - (153 * shifted + 2) / 5 + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01 Thursday 001 00:00:00 12 AM"),
            (951_782_399, "2000-02-28 Monday 059 23:59:59 11 PM"),
            (951_782_400, "2000-02-29 Tuesday 060 00:00:00 12 AM"),
            (1_721_952_000 + 46_800, "2024-07-26 Friday 208 13:00:00 01 PM"),
            (4_107_542_400, "2100-03-01 Monday 060 00:00:00 12 AM"),
            (-1, "1969-12-31 Wednesday 365 23:59:59 11 PM"),
        ] {
            assert_eq!(strftime("%F %A %j %T %I %p", seconds).unwrap(), text);
        }
        assert_eq!(strftime("%-d/%-m %y %b %B %e %a%%", 1_720_051_200).unwrap(), "4/7 24 Jul July  4 Thu%");
        assert!(strftime("%Q", 0).is_err() && strftime("%", 0).is_err());
    }

    proptest! {
        #[test]
        fn a_date_and_its_day_agree(days in -1_000_000i64..1_000_000) {
            let (year, month, day) = civil(days);
            prop_assert!((1..=12).contains(&month) && (1..=31).contains(&day));
            prop_assert_eq!(days_of(year, month, day), days);
        }
    }
}
