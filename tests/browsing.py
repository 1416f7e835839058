"""Chromium without a window, and what it shows of MLflow."""

import shutil
from contextlib import contextmanager, suppress

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync --window-size=1900,760"
)


def programs():
    """Chromium and its driver; None for what is not on the PATH."""
    return shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")


@contextmanager
def chromium(profile):
    from selenium import webdriver

    binary, driver = programs()
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS.split(), f"--user-data-dir={profile}"):
        options.add_argument(flag)
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)) as found:
        yield found


def visit(browser, address):
    """Load a page afresh: a change behind the # alone would not."""
    browser.get("about:blank")
    browser.get(address)


def wait(browser, condition, seconds=60):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, seconds, 0.3).until(lambda _: condition())


def tidy(browser):
    """Close MLflow's assistant and its notice of a shared view: they hide columns."""
    from selenium.common.exceptions import WebDriverException

    for button in browser.find_elements("css selector", "[aria-label=Close], [aria-label='Hide banner']"):
        with suppress(WebDriverException):
            button.click()


def press(browser, selector, text):
    """Click on what says this."""
    wait(browser, lambda: [e for e in browser.find_elements("css selector", selector) if e.text == text])[0].click()


def choose(browser, label, option):
    """Add an option to a list of several."""
    from selenium.webdriver.common.keys import Keys

    path = f"//div[text()='{label}']/following-sibling::div[1]//input[@role='combobox']"
    field = wait(browser, lambda: browser.find_element("xpath", path))
    field.send_keys(option, Keys.ENTER, Keys.ESCAPE)


def pick(browser, selector, option):
    """Choose from a list that holds one."""
    wait(browser, lambda: browser.find_element("id", selector)).click()
    press(browser, "[role=option]", option)


def table(browser, *, full_name=False):
    """The table of runs as the page has it: {run name: {column: text}}; the full name of a group says which."""
    cells = browser.execute_script(
        "return [...document.querySelectorAll('.ag-row')].flatMap(row => [...row.querySelectorAll('.ag-cell')].map("
        "cell => [row.getAttribute('row-index'), cell.getAttribute('col-id'), cell.innerText.trim()]))"
    )
    found = {}
    for row, column, text in cells:
        found.setdefault(row, {})[column] = text
    names = {row: cells.get("attributes.`Run Name`", "") for row, cells in found.items()}
    return {name if full_name else name.rpartition("\n")[2]: found[row] for row, name in names.items()}
