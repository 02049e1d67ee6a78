//! Parquet: a column of strings, or of conversations (lists of structs with `role` and `content`).

use super::{Batch, BatchSize, Document, Reader, Unit};
use crate::DataError;
use crate::chat::Conversation;
use parquet::basic::Type as PhysicalType;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row};
use parquet::schema::types::Type;
use serde_json::Value;
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub(crate) struct ParquetRows {
    path: PathBuf,
    rows: RowIter<'static>,
    column: String,
    size: BatchSize,
    row: u64,
    total_rows: u64,
    file_bytes: u64,
    reported: u64,
}

impl ParquetRows {
    pub(crate) fn open(path: &Path, column: Option<&str>, size: BatchSize) -> Result<ParquetRows, DataError> {
        let file = File::open(path).map_err(DataError::read(path))?;
        let file_bytes = file.metadata().map_err(DataError::read(path))?.len();
        let reader = guarded(path, || SerializedFileReader::new(file))?;
        let schema = reader.metadata().file_metadata().schema().clone();
        let total_rows = u64::try_from(reader.metadata().file_metadata().num_rows()).unwrap_or(0);
        let field = choose(path, &schema, column)?;
        let name = field.name().to_string();
        let projection = guarded(path, || Type::group_type_builder(schema.name()).with_fields(vec![field]).build())?;
        let rows = guarded(path, || RowIter::from_file_into(Box::new(reader)).project(Some(projection)))?;
        Ok(ParquetRows { path: path.to_path_buf(), rows, column: name, size, row: 0, total_rows, file_bytes, reported: 0 })
    }

    fn document(&self, row: Row) -> Result<(Document, usize), DataError> {
        let bad = |reason: String| DataError::Row { path: self.path.clone(), row: self.row, reason };
        let Some((_, field)) = row.into_columns().into_iter().next() else {
            return Err(bad(format!("has no column `{}`", self.column)));
        };
        match field {
            Field::Str(text) => {
                let bytes = text.len();
                Ok((Document::Text(text), bytes))
            }
            Field::Bytes(bytes) => {
                let text = String::from_utf8(bytes.data().to_vec())
                    .map_err(|e| bad(format!("column `{}` is not UTF-8 at byte {}", self.column, e.utf8_error().valid_up_to())))?;
                let bytes = text.len();
                Ok((Document::Text(text), bytes))
            }
            Field::Null => Err(bad(format!("column `{}` is null; remove such rows", self.column))),
            list @ Field::ListInternal(_) => {
                let value = to_json(list).map_err(&bad)?;
                let bytes = size_of_json(&value);
                Conversation::new(&value, None).map(|c| (Document::Chat(c), bytes)).map_err(bad)
            }
            _ => Err(bad(format!("column `{}` holds neither text nor a list of messages", self.column))),
        }
    }
}

impl Reader for ParquetRows {
    fn next_batch(&mut self) -> Result<Option<Batch>, DataError> {
        let mut units = Vec::new();
        let mut bytes = 0;
        while bytes < self.size.bytes {
            let rows = &mut self.rows;
            let Some(row) = guarded(&self.path, || rows.next().transpose())? else { break };
            let (document, n) = self.document(row)?;
            bytes += n.max(1);
            units.push(Unit::Document { document, row: Some(self.row) });
            self.row += 1;
        }
        if bytes < self.size.bytes && self.row != self.total_rows {
            return Err(DataError::file(
                &self.path,
                format!("not a sound Parquet file: it ends after row {} of {}", self.row, self.total_rows),
            ));
        }
        if units.is_empty() {
            return Ok(None);
        }
        // Rows are the only measure of how far a compressed file has been read.
        let reached = (u128::from(self.file_bytes) * u128::from(self.row) / u128::from(self.total_rows.max(self.row))) as u64;
        let bytes = reached - self.reported;
        self.reported = reached;
        Ok(Some(Batch { units, bytes }))
    }
}

/// Runs a call of the parquet crate; damaged files make it fail, and some make it panic.
fn guarded<T>(path: &Path, call: impl FnOnce() -> parquet::errors::Result<T>) -> Result<T, DataError> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(e)) => Err(DataError::file(path, format!("not a sound Parquet file: {e}"))),
        Err(_) => Err(DataError::file(path, "not a sound Parquet file: its pages are damaged")),
    }
}

/// The column to read: the one that is asked for, else `text`, else `messages`.
fn choose(path: &Path, schema: &Type, column: Option<&str>) -> Result<Arc<Type>, DataError> {
    let fields = schema.get_fields();
    let find = |name: &str| fields.iter().find(|f| f.name() == name).cloned();
    let names = || fields.iter().map(|f| f.name()).collect::<Vec<_>>().join(", ");
    let field = match column {
        Some(name) => find(name).ok_or_else(|| DataError::file(path, format!("has no column `{name}`; its columns are: {}", names())))?,
        None => find("text").or_else(|| find("messages")).ok_or_else(|| {
            DataError::file(
                path,
                format!("has neither a column `text` nor `messages`; name one in `data.column`; its columns are: {}", names()),
            )
        })?,
    };
    let usable = match &*field {
        Type::PrimitiveType { physical_type, .. } => *physical_type == PhysicalType::BYTE_ARRAY,
        Type::GroupType { .. } => is_list_of_structs(&field),
    };
    if !usable {
        let what = if field.is_primitive() { format!("{}", field.get_physical_type()) } else { "a group".into() };
        return Err(DataError::file(
            path,
            format!("column `{}` is {what}, neither text nor a list of messages; its columns are: {}", field.name(), names()),
        ));
    }
    Ok(field)
}

fn is_list_of_structs(field: &Type) -> bool {
    // A LIST is a group with one repeated group in it, which holds the element.
    field
        .get_fields()
        .first()
        .is_some_and(|repeated| !repeated.is_primitive() && repeated.get_fields().iter().any(|f| !f.is_primitive() || f.name() == "role"))
}

fn to_json(field: Field) -> Result<Value, String> {
    Ok(match field {
        Field::Null => Value::Null,
        Field::Bool(b) => Value::Bool(b),
        Field::Byte(n) => n.into(),
        Field::Short(n) => n.into(),
        Field::Int(n) => n.into(),
        Field::Long(n) => n.into(),
        Field::UByte(n) => n.into(),
        Field::UShort(n) => n.into(),
        Field::UInt(n) => n.into(),
        Field::ULong(n) => n.into(),
        Field::Float(x) => Value::from(f64::from(x)),
        Field::Double(x) => Value::from(x),
        Field::Str(s) => Value::String(s),
        Field::Bytes(b) => {
            Value::String(String::from_utf8(b.data().to_vec()).map_err(|_| "a message holds bytes that are not UTF-8".to_string())?)
        }
        Field::Group(row) => {
            Value::Object(row.into_columns().into_iter().map(|(name, f)| Ok((name, to_json(f)?))).collect::<Result<_, String>>()?)
        }
        Field::ListInternal(list) => Value::Array(list.elements().iter().cloned().map(to_json).collect::<Result<_, _>>()?),
        Field::MapInternal(map) => Value::Object(
            map.entries()
                .iter()
                .cloned()
                .map(|(k, v)| match to_json(k)? {
                    Value::String(k) => Ok((k, to_json(v)?)),
                    k => Ok((k.to_string(), to_json(v)?)),
                })
                .collect::<Result<_, String>>()?,
        ),
        other => Value::String(other.to_string()),
    })
}

fn size_of_json(value: &Value) -> usize {
    match value {
        Value::String(s) => s.len() + 8,
        Value::Array(a) => a.iter().map(size_of_json).sum(),
        Value::Object(o) => o.values().map(size_of_json).sum(),
        _ => 8,
    }
}
