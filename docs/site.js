// What the theme leaves open: names for its two side columns, levels for its captions, and boxes that a keyboard can scroll.
document.querySelector(".sidebar-drawer").setAttribute("aria-label", "All pages");
document.querySelector(".toc-drawer").setAttribute("aria-label", "On this page");
document.querySelectorAll(".caption[role=heading]").forEach((caption) => caption.setAttribute("aria-level", "2"));

const article = document.querySelector("article[role=main]");
const boxes = "pre, .table-wrapper, .text_html, .cell_output:has(> img), p:has(> img), mjx-container[display=true]";
const reach = () =>
  article.querySelectorAll(boxes).forEach((box) => {
    if (box.scrollWidth > box.clientWidth) box.setAttribute("tabindex", "0");
    else box.removeAttribute("tabindex");
  });
new ResizeObserver(reach).observe(article); // a window turned, a fold opened, a formula drawn
