[(method_declaration name: (_) @name body: (_) @body)
 (constructor_declaration name: (_) @name body: (_) @body)
 (compact_constructor_declaration name: (_) @name body: (_) @body)] @function
[(class_declaration name: (_) @name) (interface_declaration name: (_) @name)
 (enum_declaration name: (_) @name) (record_declaration name: (_) @name)
 (annotation_type_declaration name: (_) @name)] @scope
[(block_comment) (line_comment)] @comment
(string_literal (multiline_string_fragment)) @verbatim
