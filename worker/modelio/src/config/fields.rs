//! Typed access to the fields of a JSON object, with errors that name the field.

use crate::error::ModelError;
use crate::validate::{MAX_DIMENSION, MAX_LAYERS};
use serde_json::{Map, Value};
use std::fmt::Display;
use std::path::Path;

/// A JSON object that came from `origin`.
pub(super) struct Fields<'a> {
    map: &'a Map<String, Value>,
    origin: &'a Path,
    /// Prefix of the names in errors: the object's place in the file.
    place: String,
    pub(super) warnings: Vec<String>,
}

impl<'a> Fields<'a> {
    pub(super) fn new(map: &'a Map<String, Value>, origin: &'a Path) -> Self {
        Fields { map, origin, place: String::new(), warnings: Vec::new() }
    }

    /// The fields of an object inside this one.
    pub(super) fn nested(&self, key: &str, map: &'a Map<String, Value>) -> Fields<'a> {
        Fields { map, origin: self.origin, place: format!("{}{key}.", self.place), warnings: Vec::new() }
    }

    pub(super) fn error(&self, key: &str, text: impl Display) -> ModelError {
        ModelError::format(self.origin, format_args!("{}{key} {text}", self.place))
    }

    pub(super) fn unsupported(&self, text: impl Display) -> ModelError {
        ModelError::unsupported(self.origin, text)
    }

    pub(super) fn warn(&mut self, text: impl Display) {
        self.warnings.push(format!("{}: {text}", self.origin.display()));
    }

    /// The value, null included.
    pub(super) fn raw(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key)
    }

    /// The value, unless it is null.
    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    pub(super) fn present(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = &'a str> {
        self.map.keys().map(String::as_str)
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.error(key, format_args!("is {}, a string is needed", short(value))))
    }

    pub(super) fn flag(&self, key: &str, default: bool) -> Result<bool, ModelError> {
        let Some(value) = self.get(key) else { return Ok(default) };
        value.as_bool().ok_or_else(|| self.error(key, format_args!("is {}, true or false is needed", short(value))))
    }

    pub(super) fn list(&self, key: &str) -> Result<Option<&'a Vec<Value>>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_array().map(Some).ok_or_else(|| self.error(key, format_args!("is {}, a list is needed", short(value))))
    }

    pub(super) fn opt_number(&self, key: &str) -> Result<Option<f64>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = value.as_f64().filter(|x| x.is_finite());
        number.map(Some).ok_or_else(|| self.error(key, format_args!("is {}, a number is needed", short(value))))
    }

    pub(super) fn number(&self, key: &str, default: f64) -> Result<f64, ModelError> {
        Ok(self.opt_number(key)?.unwrap_or(default))
    }

    /// A count from 0.
    pub(super) fn count(&self, key: &str, default: u64) -> Result<u64, ModelError> {
        let Some(value) = self.get(key) else { return Ok(default) };
        value.as_u64().ok_or_else(|| self.error(key, format_args!("is {}, a whole number from 0 is needed", short(value))))
    }

    /// `None` where the field is absent, `Some(None)` where it is null.
    pub(super) fn opt_size(&self, key: &str) -> Result<Option<Option<usize>>, ModelError> {
        let Some(value) = self.raw(key) else { return Ok(None) };
        if value.is_null() {
            return Ok(Some(None));
        }
        match value.as_u64() {
            Some(n) if n > 0 && n <= MAX_DIMENSION => Ok(Some(Some(n as usize))),
            _ => Err(self.error(key, format_args!("is {}, a whole number from 1 to {MAX_DIMENSION} is needed", short(value)))),
        }
    }

    /// A dimension: from 1 to [`MAX_DIMENSION`].
    pub(super) fn size(&self, key: &str, default: usize) -> Result<usize, ModelError> {
        Ok(self.opt_size(key)?.flatten().unwrap_or(default))
    }

    /// A number of layers: from 1 to [`MAX_LAYERS`].
    pub(super) fn layers(&self, key: &str, default: usize) -> Result<usize, ModelError> {
        let n = self.size(key, default)?;
        if n as u64 > MAX_LAYERS {
            return Err(self.error(key, format_args!("is {n}, at most {MAX_LAYERS} are possible")));
        }
        Ok(n)
    }

    /// A dimension under its own name, or else under the one that other families use.
    pub(super) fn aliased_size(&self, key: &str, alias: &str, default: usize) -> Result<usize, ModelError> {
        if self.present(key) { self.size(key, default) } else { self.size(alias, default) }
    }

    /// A token id; null is none. Minus one, which some configurations hold, is none as well.
    pub(super) fn token(&self, key: &str, default: Option<u32>) -> Result<Option<u32>, ModelError> {
        match self.raw(key) {
            None => Ok(default),
            Some(value) => self.token_value(key, value),
        }
    }

    fn token_value(&self, key: &str, value: &Value) -> Result<Option<u32>, ModelError> {
        if value.is_null() || value.as_i64() == Some(-1) {
            return Ok(None);
        }
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.map(Some).ok_or_else(|| self.error(key, format_args!("is {}, a token id is needed", short(value))))
    }

    /// One token id or a list of them.
    pub(super) fn tokens(&self, key: &str, default: Option<u32>) -> Result<Vec<u32>, ModelError> {
        match self.raw(key) {
            Some(Value::Array(ids)) => {
                let mut tokens = Vec::with_capacity(ids.len());
                for id in ids {
                    tokens.extend(self.token_value(key, id)?);
                }
                Ok(tokens)
            }
            _ => Ok(self.token(key, default)?.into_iter().collect()),
        }
    }

    /// Dropout is not applied; a configuration that asks for some gets a warning.
    pub(super) fn ignored_dropout(&mut self, keys: &[&str]) -> Result<(), ModelError> {
        for key in keys {
            let rate = self.number(key, 0.0)?;
            if rate != 0.0 {
                self.warn(format_args!("{key} = {rate} is ignored: training is without dropout"));
            }
        }
        Ok(())
    }
}

/// A value as it stands in the file, cut short.
pub(super) fn short(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
