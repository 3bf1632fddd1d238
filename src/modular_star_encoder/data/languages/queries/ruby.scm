[(method name: (_) @name) (singleton_method name: (_) @name)] @function
[(class name: (_) @name) (module name: (_) @name)] @scope
(comment) @comment
[(heredoc_body) (string)] @verbatim
