//! The text format of Prometheus, version 0.0.4.

use std::collections::BTreeMap;
use std::fmt::Write;

/// Content type of a page.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Kind of metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Goes up and down.
    Gauge,
    /// Only grows, until the daemon starts again.
    Counter,
    /// Counts by upper bound.
    Histogram,
}

/// A page in the making. Samples may come in any order; they are put below their family.
#[derive(Debug, Default)]
pub struct Page {
    order: Vec<&'static str>,
    families: BTreeMap<&'static str, String>,
}

impl Page {
    /// Begins a family.
    pub fn family(&mut self, name: &'static str, kind: Kind, help: &str) {
        let kind = match kind {
            Kind::Gauge => "gauge",
            Kind::Counter => "counter",
            Kind::Histogram => "histogram",
        };
        self.order.push(name);
        self.families.insert(name, format!("# HELP {name} {}\n# TYPE {name} {kind}\n", help.replace('\\', "\\\\").replace('\n', "\\n")));
    }

    /// A sample of the family of the same name.
    pub fn sample(&mut self, name: &'static str, labels: &[(&str, &str)], value: f64) {
        self.part(name, "", labels, value);
    }

    /// A sample whose name has something after that of its family.
    pub fn part(&mut self, family: &'static str, suffix: &str, labels: &[(&str, &str)], value: f64) {
        let Some(text) = self.families.get_mut(family) else { return };
        // Writing to a string cannot fail.
        let _ = write!(text, "{family}{suffix}");
        for (i, (label, value)) in labels.iter().enumerate() {
            let _ = write!(text, "{}{label}=\"{}\"", if i == 0 { '{' } else { ',' }, escaped(value));
        }
        let _ = writeln!(text, "{} {}", if labels.is_empty() { "" } else { "}" }, number(value));
    }

    /// A family with one sample.
    pub fn one(&mut self, name: &'static str, kind: Kind, help: &str, value: f64) {
        self.family(name, kind, help);
        self.sample(name, &[], value);
    }

    /// The text.
    pub fn finish(self) -> String {
        self.order.iter().filter_map(|name| self.families.get(name)).map(String::as_str).collect()
    }
}

fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

fn number(value: f64) -> String {
    match value {
        v if v.is_nan() => "NaN".into(),
        f64::INFINITY => "+Inf".into(),
        f64::NEG_INFINITY => "-Inf".into(),
        v => v.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_escaped_and_samples_stay_with_their_family() {
        let mut p = Page::default();
        p.family("b", Kind::Counter, "One\nline \\.");
        p.family("a", Kind::Gauge, "Two.");
        p.sample("a", &[], f64::INFINITY);
        p.sample("b", &[("x", "q\"\\\n"), ("y", "")], 1e21);
        p.sample("nobody", &[], 1.0);
        let text = "# HELP b One\\nline \\\\.\n# TYPE b counter\nb{x=\"q\\\"\\\\\\n\",y=\"\"} 1000000000000000000000\n# HELP a Two.\n# TYPE a gauge\na +Inf\n";
        assert_eq!(p.finish(), text);
    }
}
