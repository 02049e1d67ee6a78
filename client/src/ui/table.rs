//! Aligned columns.

use super::text;

/// Where a column's cells stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Align {
    /// Words.
    Left,
    /// Numbers.
    Right,
}

/// Rows under a header, two spaces between columns, no trailing blanks.
#[derive(Debug, Clone)]
pub struct Table {
    columns: Vec<(&'static str, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table without rows.
    pub fn new(columns: &[(&'static str, Align)]) -> Self {
        Table { columns: columns.to_vec(), rows: Vec::new() }
    }

    /// Adds a row; missing cells are empty, cells beyond the last column are dropped.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let mut cells: Vec<String> = cells.into_iter().map(|cell| text::one_line(&cell)).collect();
        cells.resize(self.columns.len(), String::new());
        self.rows.push(cells);
    }

    /// The whole table, every line with its newline. Without rows, the header alone.
    pub fn render(&self) -> String {
        let header: Vec<String> = self.columns.iter().map(|(name, _)| (*name).to_owned()).collect();
        let width = |i: usize| {
            let cells = std::iter::once(&header).chain(&self.rows).map(|row| console::measure_text_width(&row[i]));
            cells.max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.columns.len()).map(width).collect();
        let mut out = String::new();
        for row in std::iter::once(&header).chain(&self.rows) {
            let mut line = String::new();
            for (i, cell) in row.iter().enumerate() {
                let padding = " ".repeat(widths[i].saturating_sub(console::measure_text_width(cell)));
                let gap = if i == 0 { "" } else { "  " };
                match self.columns[i].1 {
                    Align::Left => line.extend([gap, cell, &padding]),
                    Align::Right => line.extend([gap, &padding, cell]),
                }
            }
            out.push_str(line.trim_end());
            out.push('\n');
        }
        out
    }
}

/// `name  value` lines, the values aligned; those without a value are left out.
pub fn fields(rows: &[(&str, String)]) -> String {
    let shown = || rows.iter().filter(|(_, value)| !value.is_empty());
    let width = shown().map(|(name, _)| name.len()).max().unwrap_or(0);
    shown().map(|(name, value)| format!("{name:width$}  {}\n", text::one_line(value))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_by_what_is_seen() {
        let mut table = Table::new(&[("NAME", Align::Left), ("STEP", Align::Right), ("STATE", Align::Left)]);
        table.row(["größe".into(), "7".into(), "running".into()]);
        table.row(["日本".into(), "12345".into(), "".into()]);
        assert_eq!(table.render(), "NAME    STEP  STATE\ngröße      7  running\n日本   12345\n");
    }

    #[test]
    fn a_row_of_another_length_is_made_to_fit() {
        let mut table = Table::new(&[("A", Align::Left), ("B", Align::Right)]);
        table.row(["x".into()]);
        table.row(["1".into(), "2".into(), "3".into()]);
        assert_eq!(table.render(), "A  B\nx\n1  2\n");
    }

    #[test]
    fn a_cell_cannot_break_the_table() {
        let mut table = Table::new(&[("A", Align::Left)]);
        table.row(["one\ntwo\x1b[31m".into()]);
        assert_eq!(table.render(), "A\none two\u{fffd}[31m\n");
    }

    #[test]
    fn absent_fields_take_no_line() {
        assert_eq!(fields(&[("id", "7".into()), ("message", String::new()), ("state", "running".into())]), "id     7\nstate  running\n");
    }
}
