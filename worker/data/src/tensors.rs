//! Training data of plain stacks: safetensors files with `inputs` and `targets`.

use crate::{DataError, DataFile, map::Map};
use rayon::prelude::*;
use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::sync::Arc;

/// Widths that every file of a data set shares.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorLayout {
    /// Numbers in a row of `inputs`.
    pub input_width: usize,
    /// What a row of `targets` is.
    pub target: TargetLayout,
}

impl std::fmt::Display for TensorLayout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.target {
            TargetLayout::Values { width } => write!(f, "inputs [N, {}] and targets [N, {width}]", self.input_width),
            TargetLayout::Classes => write!(f, "inputs [N, {}] and targets [N] of classes", self.input_width),
        }
    }
}

/// What a row of `targets` is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TargetLayout {
    /// f32 `[N, width]`, for a mean squared error.
    Values {
        /// Numbers in a row.
        width: usize,
    },
    /// Integers `[N]`, for a cross-entropy.
    Classes,
}

/// Where [`TensorData::row`] puts the target.
#[derive(Debug)]
pub enum TargetRow<'a> {
    /// Values; the slice is as wide as [`TargetLayout::Values`] says.
    Values(&'a mut [f32]),
    /// A class index.
    Class(&'a mut u32),
}

/// Rows of one or more mapped files. Cheap to clone; may be used from many threads.
#[derive(Debug, Clone)]
pub struct TensorData {
    files: Arc<Vec<TensorFile>>,
    layout: TensorLayout,
    first: u64,
    rows: u64,
}

#[derive(Debug)]
struct TensorFile {
    map: Map,
    shape: FileShape,
    /// Index of its first row.
    first: u64,
}

/// Where the two tensors lie in a file; checked against its length.
#[derive(Debug, Clone, Copy)]
struct FileShape {
    rows: u64,
    layout: TensorLayout,
    inputs_at: usize,
    targets_at: usize,
    target_type: Dtype,
}

impl TensorData {
    pub(crate) fn open(files: &[DataFile], layout: TensorLayout) -> Result<TensorData, DataError> {
        let mut rows = 0u64;
        let mut open = Vec::with_capacity(files.len());
        for file in files {
            let map = file.map()?;
            let shape = read_shape(&map, &file.path)?;
            if shape.layout != layout || shape.rows != file.items {
                return Err(DataError::Changed { path: file.path.clone(), reason: "its tensors have another shape".into() });
            }
            open.push(TensorFile { map, shape, first: rows });
            rows += shape.rows;
        }
        Ok(TensorData { files: Arc::new(open), layout, first: 0, rows })
    }

    /// Rows `first .. first + rows` of these, as far as there are.
    pub(crate) fn slice(&self, first: u64, rows: u64) -> TensorData {
        let first = first.min(self.rows);
        TensorData { first: self.first + first, rows: rows.min(self.rows - first), ..self.clone() }
    }

    /// Number of rows.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Numbers in a row of inputs.
    pub fn input_width(&self) -> usize {
        self.layout.input_width
    }

    /// What a row of targets is.
    pub fn target(&self) -> TargetLayout {
        self.layout.target
    }

    /// Reads row `i`: its inputs (`input_width` long) and its target.
    ///
    /// # Panics
    /// Where `i` is not below [`TensorData::rows`], or `inputs` or `target` is not what the layout says.
    pub fn row(&self, i: u64, inputs: &mut [f32], target: TargetRow) {
        assert!(i < self.rows, "row {i} of {}", self.rows);
        assert_eq!(inputs.len(), self.layout.input_width, "inputs per row");
        let row = self.first + i;
        let file = &self.files[self.files.partition_point(|f| f.first + f.shape.rows <= row)];
        let place = (row - file.first) as usize;
        let at = file.shape.inputs_at + place * inputs.len() * 4;
        read_f32(&file.map[at..at + inputs.len() * 4], inputs);
        match (target, self.layout.target) {
            (TargetRow::Values(values), TargetLayout::Values { width }) if values.len() == width => {
                let at = file.shape.targets_at + place * width * 4;
                read_f32(&file.map[at..at + width * 4], values);
            }
            (TargetRow::Class(class), TargetLayout::Classes) => {
                // Checked when the data was prepared; a file changed since then reads as an index that no model has.
                *class = read_integer(&file.map, &file.shape, place).and_then(|c| u32::try_from(c).ok()).unwrap_or(u32::MAX);
            }
            (asked, layout) => panic!("target {asked:?} of a file with {layout:?}"),
        }
    }
}

fn read_f32(bytes: &[u8], out: &mut [f32]) {
    for (value, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
        *value = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
    }
}

/// Integer `place` of `targets`; `None` where it is too large for any class.
fn read_integer(map: &[u8], shape: &FileShape, place: usize) -> Option<i64> {
    let width = integer_bytes(shape.target_type)?;
    let bytes = &map[shape.targets_at + place * width..][..width];
    let negative = is_signed(shape.target_type) && bytes[width - 1] & 0x80 != 0;
    let mut wide = [if negative { 0xff } else { 0 }; 8];
    wide[..width].copy_from_slice(bytes);
    match shape.target_type {
        Dtype::U64 => i64::try_from(u64::from_le_bytes(wide)).ok(),
        _ => Some(i64::from_le_bytes(wide)),
    }
}

fn integer_bytes(dtype: Dtype) -> Option<usize> {
    match dtype {
        Dtype::I8 | Dtype::U8 => Some(1),
        Dtype::I16 | Dtype::U16 => Some(2),
        Dtype::I32 | Dtype::U32 => Some(4),
        Dtype::I64 | Dtype::U64 => Some(8),
        _ => None,
    }
}

fn is_signed(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::I8 | Dtype::I16 | Dtype::I32 | Dtype::I64)
}

/// Longest header that is read, as in the safetensors crate.
const HEADER_MAX_BYTES: usize = 100_000_000;

/// Finds and checks the two tensors of a file.
fn read_shape(map: &[u8], path: &Path) -> Result<FileShape, DataError> {
    let bad = |reason: String| DataError::file(path, reason);
    let unsound = |what: &str| bad(format!("not a sound safetensors file: {what}"));
    let length = map.first_chunk().map(|b| u64::from_le_bytes(*b)).ok_or_else(|| unsound("shorter than its header"))?;
    let data_at = usize::try_from(length).ok().filter(|n| *n <= HEADER_MAX_BYTES).ok_or_else(|| unsound("header too long"))? + 8;
    // Parsed from a copy: mapped bytes may change, and text must not.
    let header = map.get(8..data_at).ok_or_else(|| unsound("shorter than its header"))?.to_vec();
    // This also checks each tensor's place against its shape and type.
    let meta: Metadata = serde_json::from_slice(&header).map_err(|e| unsound(&e.to_string()))?;
    if data_at.checked_add(meta.data_len()).is_none_or(|end| end > map.len()) {
        return Err(bad("the safetensors file is cut short".into()));
    }
    let info = |name: &str| {
        meta.info(name).ok_or_else(|| {
            let mut names = meta.offset_keys();
            names.truncate(8);
            bad(format!("has no tensor `{name}` (it has: {}); a plain stack trains on `inputs` [N, in] and `targets`", names.join(", ")))
        })
    };
    let (inputs, targets) = (info("inputs")?, info("targets")?);
    let &[rows, input_width] = &inputs.shape[..] else {
        return Err(bad(format!("`inputs` must have two dimensions [N, in], not {:?}", inputs.shape)));
    };
    if inputs.dtype != Dtype::F32 {
        return Err(bad(format!("`inputs` must be F32, not {:?}; convert it before saving", inputs.dtype)));
    }
    if rows == 0 || input_width == 0 {
        return Err(bad(format!("`inputs` is empty: {:?}", inputs.shape)));
    }
    let target = match (&targets.shape[..], targets.dtype) {
        (&[n, width], Dtype::F32) if n == rows && width > 0 => TargetLayout::Values { width },
        (&[n], dtype) if n == rows && integer_bytes(dtype).is_some() => TargetLayout::Classes,
        (shape, dtype) => {
            return Err(bad(format!(
                "`targets` must be F32 [{rows}, out] or integers [{rows}] to go with `inputs` {:?}, not {dtype:?} {shape:?}",
                inputs.shape
            )));
        }
    };
    Ok(FileShape {
        rows: rows as u64,
        layout: TensorLayout { input_width, target },
        inputs_at: data_at + inputs.data_offsets.0,
        targets_at: data_at + targets.data_offsets.0,
        target_type: targets.dtype,
    })
}

/// Reads the layout of a file and checks every value: numbers are finite, classes are in `0..classes`.
pub(crate) fn inspect(map: &[u8], path: &Path, classes: Option<usize>) -> Result<(TensorLayout, u64), DataError> {
    let shape = read_shape(map, path)?;
    let row_error = |row: usize, reason: String| DataError::Row { path: path.to_path_buf(), row: row as u64, reason };
    let floats = |name: &str, at: usize, width: usize| {
        let bytes = &map[at..at + shape.rows as usize * width * 4];
        let bad = bytes
            .par_chunks(width * 4)
            .position_first(|row| row.chunks_exact(4).any(|b| !f32::from_le_bytes([b[0], b[1], b[2], b[3]]).is_finite()));
        bad.map_or(Ok(()), |row| Err(row_error(row, format!("`{name}` holds a number that is not finite (NaN or infinity)"))))
    };
    floats("inputs", shape.inputs_at, shape.layout.input_width)?;
    match shape.layout.target {
        TargetLayout::Values { width } => floats("targets", shape.targets_at, width)?,
        TargetLayout::Classes => {
            let limit = classes.map_or(i64::from(u32::MAX), |c| i64::try_from(c).unwrap_or(i64::MAX));
            let class = |row: usize| read_integer(map, &shape, row);
            let bad = (0..shape.rows as usize).into_par_iter().find_first(|&row| class(row).is_none_or(|c| c < 0 || c >= limit));
            if let Some(row) = bad {
                let value = class(row).map_or("too large".to_string(), |c| c.to_string());
                return Err(row_error(
                    row,
                    format!("class {value} in `targets` is not between 0 and {} (the model has {limit} outputs)", limit - 1),
                ));
            }
        }
    }
    Ok((shape.layout, shape.rows))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file::modified_ns;
    use crate::testing::write;
    use proptest::prelude::*;
    use safetensors::tensor::TensorView;

    fn encode(tensors: &[(&str, Dtype, &[usize], Vec<u8>)]) -> Vec<u8> {
        let views: Vec<_> =
            tensors.iter().map(|(name, d, shape, data)| (*name, TensorView::new(*d, shape.to_vec(), data).unwrap())).collect();
        safetensors::serialize(views, None).unwrap()
    }

    fn f32s(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    fn pair(target: Dtype, shape: &[usize], data: Vec<u8>) -> Vec<u8> {
        encode(&[("inputs", Dtype::F32, &[2, 3], f32s(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])), ("targets", target, shape, data)])
    }

    fn open(dir: &Path, files: &[Vec<u8>]) -> TensorData {
        let mut layout = None;
        let files: Vec<_> = files
            .iter()
            .enumerate()
            .map(|(i, bytes)| {
                let path = write(dir, &i.to_string(), bytes);
                let (found, rows) = inspect(bytes, &path, None).unwrap();
                layout = Some(found);
                let meta = path.metadata().unwrap();
                DataFile { path, bytes: meta.len(), modified_ns: modified_ns(&meta), blake3: String::new(), data_offset: 0, items: rows }
            })
            .collect();
        TensorData::open(&files, layout.unwrap()).unwrap()
    }

    fn error(bytes: &[u8], classes: Option<usize>) -> String {
        inspect(bytes, Path::new("d.safetensors"), classes).unwrap_err().to_string()
    }

    #[test]
    fn values_of_several_files() {
        let dir = tempfile::tempdir().unwrap();
        let file = pair(Dtype::F32, &[2, 1], f32s(&[10.0, 20.0]));
        let data = open(dir.path(), &[file.clone(), file]);
        assert_eq!((data.rows(), data.input_width(), data.target()), (4, 3, TargetLayout::Values { width: 1 }));
        let (mut x, mut y) = ([0.0; 3], [0.0; 1]);
        data.row(3, &mut x, TargetRow::Values(&mut y));
        assert_eq!((x, y), ([4.0, 5.0, 6.0], [20.0]));
        let last = data.slice(2, 9);
        assert_eq!(last.rows(), 2);
        last.row(0, &mut x, TargetRow::Values(&mut y));
        assert_eq!((x, y), ([1.0, 2.0, 3.0], [10.0]));
        assert_eq!(data.slice(9, 1).rows(), 0);
    }

    #[test]
    fn classes_of_every_integer_type() {
        let dir = tempfile::tempdir().unwrap();
        for (dtype, data) in [
            (Dtype::I64, [0i64, 200].iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>()),
            (Dtype::U64, [0u64, 200].iter().flat_map(|v| v.to_le_bytes()).collect()),
            (Dtype::I32, [0i32, 200].iter().flat_map(|v| v.to_le_bytes()).collect()),
            (Dtype::U32, [0u32, 200].iter().flat_map(|v| v.to_le_bytes()).collect()),
            (Dtype::I16, [0i16, 200].iter().flat_map(|v| v.to_le_bytes()).collect()),
            (Dtype::U16, [0u16, 200].iter().flat_map(|v| v.to_le_bytes()).collect()),
            (Dtype::U8, vec![0, 200]),
        ] {
            let file = pair(dtype, &[2], data);
            let data = open(dir.path(), std::slice::from_ref(&file));
            let (mut x, mut class) = ([0.0; 3], 0);
            data.row(1, &mut x, TargetRow::Class(&mut class));
            assert_eq!(class, 200, "{dtype:?}");
            assert!(error(&file, Some(200)).contains("row 1: class 200 in `targets` is not between 0 and 199"));
            inspect(&file, Path::new("d"), Some(201)).unwrap();
        }
        assert!(error(&pair(Dtype::I8, &[2], vec![1, 0xff]), None).contains("row 1: class -1"));
        assert!(error(&pair(Dtype::U64, &[2], vec![0xff; 16]), None).contains("row 0: class too large"));
    }

    #[test]
    fn wrong_files_say_what_would_be_right() {
        let two = Dtype::F32;
        for (bytes, what) in [
            (b"hello".to_vec(), "not a sound safetensors file"),
            (encode(&[("x", two, &[1], f32s(&[1.0]))]), "no tensor `inputs` (it has: x)"),
            (encode(&[("inputs", two, &[1, 1], f32s(&[1.0]))]), "no tensor `targets`"),
            (encode(&[("inputs", two, &[2], f32s(&[1.0, 2.0])), ("targets", two, &[2, 1], f32s(&[1.0, 2.0]))]), "two dimensions"),
            (encode(&[("inputs", Dtype::F16, &[1, 1], vec![0; 2]), ("targets", two, &[1, 1], f32s(&[1.0]))]), "must be F32, not F16"),
            (encode(&[("inputs", two, &[0, 3], vec![]), ("targets", two, &[0, 1], vec![])]), "empty"),
            (pair(two, &[3, 1], f32s(&[1.0; 3])), "[2, out] or integers [2]"),
            (pair(Dtype::F64, &[2, 1], vec![0; 16]), "not F64 [2, 1]"),
            (pair(two, &[2, 1], f32s(&[1.0, f32::NAN])), "row 1: `targets` holds a number that is not finite"),
        ] {
            let e = error(&bytes, None);
            assert!(e.contains(what) && e.starts_with("d.safetensors"), "{e}");
        }
        let good = pair(two, &[2, 1], f32s(&[1.0, 2.0]));
        assert!(error(&good[..good.len() - 1], None).contains("cut short"));
    }

    proptest! {
        #[test]
        fn damaged_files_never_panic(at in 0usize..200, byte: u8, cut in 0usize..200) {
            let mut bytes = pair(Dtype::I32, &[2], vec![0; 8]);
            let at = at % bytes.len();
            bytes[at] = byte;
            let _ = inspect(&bytes, Path::new("d"), Some(4));
            let _ = inspect(&bytes[..cut.min(bytes.len())], Path::new("d"), Some(4));
        }
    }
}
