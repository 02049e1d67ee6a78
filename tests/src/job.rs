//! Job files, written key by key.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A job file in the making: dotted keys and TOML literals.
///
/// ```
/// use ramtorch_tests::JobFile;
/// let job = JobFile::new("tiny").set("model.path", "m").set("train.steps", 3).set("optimizer.betas", [0.9, 0.95]);
/// assert_eq!(job.text(), "name = \"tiny\"\n[model]\npath = \"m\"\n[optimizer]\nbetas = [0.9, 0.95]\n[train]\nsteps = 3\n");
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct JobFile {
    tables: BTreeMap<String, BTreeMap<String, String>>,
}

impl JobFile {
    /// A job with this name and nothing else.
    pub fn new(name: &str) -> JobFile {
        JobFile { tables: BTreeMap::new() }.set("name", name)
    }

    /// Sets `table.key`, or a key outside of any table.
    pub fn set(mut self, key: &str, value: impl Literal) -> JobFile {
        let (table, leaf) = key.rsplit_once('.').unwrap_or(("", key));
        self.tables.entry(table.to_owned()).or_default().insert(leaf.to_owned(), value.literal());
        self
    }

    /// What a key is set to, as it stands in the file.
    pub fn get(&self, key: &str) -> Option<&str> {
        let (table, leaf) = key.rsplit_once('.').unwrap_or(("", key));
        self.tables.get(table)?.get(leaf).map(String::as_str)
    }

    /// Takes a key out.
    pub fn unset(mut self, key: &str) -> JobFile {
        let (table, leaf) = key.rsplit_once('.').unwrap_or(("", key));
        if let Some(t) = self.tables.get_mut(table) {
            t.remove(leaf);
        }
        self
    }

    /// The file's text.
    pub fn text(&self) -> String {
        let mut out = String::new();
        for (table, keys) in self.tables.iter().filter(|(_, keys)| !keys.is_empty()) {
            if !table.is_empty() {
                out += &format!("[{table}]\n");
            }
            for (key, value) in keys {
                out += &format!("{key} = {value}\n");
            }
        }
        out
    }

    /// Writes the file; returns its path.
    pub fn write(&self, path: PathBuf) -> PathBuf {
        std::fs::write(&path, self.text()).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        path
    }
}

/// A value that TOML can write.
pub trait Literal {
    /// Its TOML form.
    fn literal(&self) -> String;
}

impl Literal for &str {
    fn literal(&self) -> String {
        // TOML's basic strings take the escapes of JSON.
        serde_json::Value::from(*self).to_string()
    }
}

impl Literal for String {
    fn literal(&self) -> String {
        self.as_str().literal()
    }
}

impl Literal for &Path {
    fn literal(&self) -> String {
        self.to_str().expect("test paths are UTF-8").literal()
    }
}

impl Literal for PathBuf {
    fn literal(&self) -> String {
        self.as_path().literal()
    }
}

impl Literal for &PathBuf {
    fn literal(&self) -> String {
        self.as_path().literal()
    }
}

impl Literal for f64 {
    fn literal(&self) -> String {
        format!("{self:?}")
    }
}

impl Literal for bool {
    fn literal(&self) -> String {
        self.to_string()
    }
}

macro_rules! integers {
    ($($t:ty)*) => {$(
        impl Literal for $t {
            fn literal(&self) -> String {
                self.to_string()
            }
        }
    )*};
}
integers!(i32 i64 u32 u64 usize);

impl<T: Literal> Literal for Vec<T> {
    fn literal(&self) -> String {
        format!("[{}]", self.iter().map(Literal::literal).collect::<Vec<_>>().join(", "))
    }
}

impl<T: Literal, const N: usize> Literal for [T; N] {
    fn literal(&self) -> String {
        format!("[{}]", self.iter().map(Literal::literal).collect::<Vec<_>>().join(", "))
    }
}
