//! What S3 answers, and what it is told, in XML.

use base64::{Engine, engine::general_purpose::STANDARD};
use roxmltree::{Document as Tree, Node, ParsingOptions};

use crate::store::{
    bucket::{Checksums, ETag, StoredAs},
    http::{Answer, Refusal, shown},
};

/// Elements of a document of 1000 objects with all that is said of each, and
/// as many again: more is no answer of a store.
const MAX_NODES: u32 = 100_000;

/// An answer that was understood, flat: S3's documents have lists of records
/// and nothing deeper.
#[derive(Debug)]
pub struct Document {
    root: String,
    /// Name and text of each child of the root that has no children.
    texts: Vec<(String, String)>,
    /// Name and children of the others.
    records: Vec<(String, Vec<(String, String)>)>,
}

impl Document {
    /// Reads `body`: at most as long as an answer may be, without entities.
    pub fn parse(body: &[u8]) -> Result<Self, roxmltree::Error> {
        let text = String::from_utf8_lossy(body);
        let options = ParsingOptions { nodes_limit: MAX_NODES, ..ParsingOptions::default() };
        let tree = Tree::parse_with_options(&text, options)?;
        let root = tree.root_element();
        let (mut texts, mut records) = (Vec::new(), Vec::new());
        for child in root.children().filter(Node::is_element) {
            let fields: Vec<_> = child.children().filter(Node::is_element).map(field).collect();
            match fields.is_empty() {
                true => texts.push(field(child)),
                false => records.push((child.tag_name().name().to_owned(), fields)),
            }
        }
        Ok(Self { root: root.tag_name().name().to_owned(), texts, records })
    }

    /// Whether it tells of an error.
    pub fn is_error(&self) -> bool {
        self.root == "Error"
    }

    /// The text of `name`.
    pub fn text(&self, name: &str) -> Option<String> {
        lookup(&self.texts, name).map(str::to_owned)
    }

    /// The texts of `fields` in each record called `name`; one that lacks any
    /// is left out.
    pub fn each<'a, const N: usize>(
        &'a self,
        name: &'a str,
        fields: &'a [&str; N],
    ) -> impl Iterator<Item = [String; N]> {
        self.records.iter().filter(move |(record, _)| record == name).filter_map(|(_, record)| {
            fields
                .iter()
                .map(|field| lookup(record, field).map(str::to_owned))
                .collect::<Option<Vec<_>>>()?
                .try_into()
                .ok()
        })
    }
}

fn field(node: Node<'_, '_>) -> (String, String) {
    (node.tag_name().name().to_owned(), node.text().unwrap_or_default().to_owned())
}

fn lookup<'a>(fields: &'a [(String, String)], name: &str) -> Option<&'a str> {
    fields.iter().find(|(field, _)| field == name).map(|(_, text)| text.as_str())
}

/// Why a request was refused.
pub fn refusal(answer: &Answer) -> Refusal {
    let document = Document::parse(&answer.body).ok().filter(Document::is_error);
    let text = |name| document.as_ref().and_then(|d| d.text(name)).unwrap_or_default();
    let request_id = match answer.header("x-amz-request-id") {
        "" => text("RequestId"),
        id => id.to_owned(),
    };
    Refusal {
        status: answer.status.as_u16(),
        code: shown(&text("Code")),
        message: shown(&text("Message")),
        request_id: shown(&request_id),
    }
}

/// The order to complete an upload.
pub fn completion(parts: &[StoredAs], checksums: Checksums) -> String {
    let mut text = String::from("<CompleteMultipartUpload>");
    for StoredAs { number, etag: ETag(etag), sha256 } in parts {
        let etag = etag.replace('&', "&amp;").replace('<', "&lt;");
        let checksum = match checksums {
            Checksums::Sha256 => {
                format!("<ChecksumSHA256>{}</ChecksumSHA256>", STANDARD.encode(sha256.0))
            }
            Checksums::Untold => String::new(),
        };
        text.push_str(&format!(
            "<Part><PartNumber>{number}</PartNumber><ETag>{etag}</ETag>{checksum}</Part>"
        ));
    }
    text.push_str("</CompleteMultipartUpload>");
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// What looks like an answer, and what does not, is an answer or an
        /// error.
        #[test]
        fn any_bytes_are_survived(
            bytes in prop::collection::vec(any::<u8>(), 0..400),
            text in "(<[a-zA-Z]{1,3}>|</[a-zA-Z]{1,3}>|&[a-z#0-9]{1,4};|<!DOCTYPE a \\[|<!ENTITY|[ a-z]){0,60}",
        ) {
            for body in [&bytes[..], text.as_bytes()] {
                if let Ok(document) = Document::parse(body) {
                    document.each("Upload", &["Key", "UploadId"]).for_each(drop);
                }
            }
        }
    }

    #[test]
    fn what_is_made_to_be_slow_is_refused() {
        let (deep, wide) = ("<a>".repeat(300_000), "<a/>".repeat(300_000));
        let lol = "<!DOCTYPE a [<!ENTITY b \"bb\"><!ENTITY c \"&b;&b;\">]><a>&c;</a>";
        for body in [deep, format!("<a>{wide}</a>"), lol.into()] {
            assert!(Document::parse(body.as_bytes()).is_err());
        }
    }

    #[test]
    fn lists_are_understood_and_foreign_documents_are_not() {
        let text = br#"<?xml version="1.0"?>
            <ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">
            <IsTruncated>false</IsTruncated>
            <Contents><Key>a &amp; b</Key><Size>3</Size></Contents>
            <Contents><Size>3</Size></Contents>
            <Contents><Key>c</Key></Contents></ListBucketResult>"#;
        let document = Document::parse(text).unwrap();
        assert_eq!(document.text("IsTruncated").unwrap(), "false");
        let keys: Vec<_> = document.each("Contents", &["Key"]).map(|[key]| key).collect();
        assert_eq!(keys, ["a & b", "c"]);
        for foreign in [&b"<html><p>hello"[..], b"", b"{}", b"\xff\xfe", b"<a>&b;</a>"] {
            assert!(Document::parse(foreign).is_err());
        }
        // Entities that grow are not expanded.
        let bomb = b"<!DOCTYPE a [<!ENTITY b \"bbbbbbbb\"><!ENTITY c \"&b;&b;&b;\">]><a>&c;</a>";
        assert!(Document::parse(bomb).is_err());
    }

    #[test]
    fn an_order_to_complete_names_every_part() {
        let part = |number, etag: &str| StoredAs {
            number,
            etag: ETag(etag.into()),
            sha256: crate::model::image::ObjectDigest([0; 32]),
        };
        let parts = [part(1, "\"a\""), part(3, "b&<")];
        let told = completion(&parts[..1], Checksums::Sha256);
        assert!(told.contains("<ChecksumSHA256>AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=</Ch"));
        insta::assert_snapshot!(completion(&parts, Checksums::Untold), @r#"<CompleteMultipartUpload><Part><PartNumber>1</PartNumber><ETag>"a"</ETag></Part><Part><PartNumber>3</PartNumber><ETag>b&amp;&lt;</ETag></Part></CompleteMultipartUpload>"#);
    }
}
