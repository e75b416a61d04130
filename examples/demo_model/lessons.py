"""Small teaching programs, written for the demo model to learn from.

This file is training data and also valid Python: `corpus.py` splits it at double blank lines,
and each piece becomes a document. The docstring of a piece, and the comment lines above it if
there are any, are the ways a user may ask for it. It is written without type annotations, as
the standard library is, and every piece imports what it needs so that it stands alone.
"""
# SPDX-License-Identifier: Apache-2.0
# fmt: off
# ruff: noqa
# mypy: ignore-errors


# fibonacci number
# nth fibonacci
# Write a fibonacci function.
def fibonacci(n):
    """Return the n-th Fibonacci number."""
    a, b = 0, 1
    for _ in range(n):
        a, b = b, a + b
    return a


# recursive fibonacci
# fibonacci with recursion
def fib(n):
    """Compute the n-th Fibonacci number recursively."""
    if n < 2:
        return n
    return fib(n - 1) + fib(n - 2)


# fibonacci generator
# first n fibonacci numbers
# print the fibonacci sequence
def fibonacci_sequence(n):
    """Yield the first n Fibonacci numbers."""
    a, b = 0, 1
    for _ in range(n):
        yield a
        a, b = b, a + b


# memoized fibonacci
# fibonacci with a cache
from functools import lru_cache

@lru_cache(maxsize=None)
def fibonacci_cached(n):
    """Return the n-th Fibonacci number, remembering earlier results."""
    if n < 2:
        return n
    return fibonacci_cached(n - 1) + fibonacci_cached(n - 2)


# factorial function
# n factorial
# Write a recursive factorial.
def factorial(n):
    """Return the factorial of n."""
    if n < 0:
        raise ValueError("n must not be negative")
    if n <= 1:
        return 1
    return n * factorial(n - 1)


# factorial with a loop
def factorial_loop(n):
    """Compute the factorial of n with a loop."""
    result = 1
    for i in range(2, n + 1):
        result *= i
    return result


# greatest common divisor
# Euclid's algorithm
def gcd(a, b):
    """Return the greatest common divisor of a and b."""
    while b:
        a, b = b, a % b
    return a


# least common multiple
def lcm(a, b):
    """Return the least common multiple of a and b."""
    if a == 0 or b == 0:
        return 0
    return abs(a * b) // gcd(a, b)


# prime check
# test if a number is prime
# Is this number a prime?
def is_prime(n):
    """Check whether n is a prime number."""
    if n < 2:
        return False
    i = 2
    while i * i <= n:
        if n % i == 0:
            return False
        i += 1
    return True


# sieve of Eratosthenes
# list of primes
# all primes below n
def primes_up_to(n):
    """Return a list of all primes up to n."""
    is_composite = [False] * (n + 1)
    primes = []
    for i in range(2, n + 1):
        if is_composite[i]:
            continue
        primes.append(i)
        for j in range(i * i, n + 1, i):
            is_composite[j] = True
    return primes


# prime factorization
# factorize a number
def prime_factors(n):
    """Return the prime factors of n in ascending order."""
    factors = []
    divisor = 2
    while divisor * divisor <= n:
        while n % divisor == 0:
            factors.append(divisor)
            n //= divisor
        divisor += 1
    if n > 1:
        factors.append(n)
    return factors


def divisors(n):
    """Return all positive divisors of n."""
    return [i for i in range(1, n + 1) if n % i == 0]


# even or odd
def is_even(n):
    """Return True if n is even."""
    return n % 2 == 0


def is_odd(n):
    """Return True if n is odd."""
    return n % 2 == 1


# add two numbers
# sum of two numbers
def add(a, b):
    """Return the sum of a and b."""
    return a + b


def subtract(a, b):
    """Return the difference of a and b."""
    return a - b


# multiply two numbers
def multiply(a, b):
    """Return the product of a and b."""
    return a * b


# safe division
def divide(a, b):
    """Divide a by b."""
    if b == 0:
        raise ZeroDivisionError("cannot divide by zero")
    return a / b


# exponentiation by squaring
# raise a number to a power
def power(base, exponent):
    """Compute base raised to a non-negative integer exponent."""
    result = 1
    while exponent > 0:
        if exponent % 2 == 1:
            result *= base
        base *= base
        exponent //= 2
    return result


# Newton's method for the square root
def square_root(x, tolerance=1e-10):
    """Approximate the square root of x with Newton's method."""
    if x < 0:
        raise ValueError("x must not be negative")
    if x == 0:
        return 0.0
    guess = x
    while abs(guess * guess - x) > tolerance * x:
        guess = (guess + x / guess) / 2
    return guess


def square(x):
    """Return the square of x."""
    return x * x


def absolute(x):
    """Return the absolute value of x."""
    if x < 0:
        return -x
    return x


# sum the digits of a number
def digit_sum(n):
    """Return the sum of the decimal digits of n."""
    total = 0
    while n > 0:
        total += n % 10
        n //= 10
    return total


# perfect number check
def is_perfect(n):
    """Check whether n equals the sum of its proper divisors."""
    return n > 1 and sum(i for i in range(1, n) if n % i == 0) == n


# collatz sequence
def collatz(n):
    """Return the Collatz sequence that starts at n."""
    sequence = [n]
    while n != 1:
        if n % 2 == 0:
            n //= 2
        else:
            n = 3 * n + 1
        sequence.append(n)
    return sequence


# fizz buzz
# FizzBuzz program
def fizzbuzz(n):
    """Print the numbers from 1 to n, with Fizz and Buzz."""
    for i in range(1, n + 1):
        if i % 15 == 0:
            print("FizzBuzz")
        elif i % 3 == 0:
            print("Fizz")
        elif i % 5 == 0:
            print("Buzz")
        else:
            print(i)


def is_leap_year(year):
    """Return True if year is a leap year."""
    return year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)


# convert Celsius to Fahrenheit
def celsius_to_fahrenheit(celsius):
    """Convert a temperature from Celsius to Fahrenheit."""
    return celsius * 9 / 5 + 32


# convert Fahrenheit to Celsius
def fahrenheit_to_celsius(fahrenheit):
    """Convert a temperature from Fahrenheit to Celsius."""
    return (fahrenheit - 32) * 5 / 9


# decimal to binary
def to_binary(n):
    """Convert a non-negative integer to a binary string."""
    if n == 0:
        return "0"
    digits = ""
    while n > 0:
        digits = str(n % 2) + digits
        n //= 2
    return digits


# binary to decimal
def from_binary(text):
    """Convert a binary string to an integer."""
    value = 0
    for digit in text:
        value = value * 2 + int(digit)
    return value


# convert an integer to a Roman numeral
def to_roman(n):
    """Convert an integer to a Roman numeral."""
    numerals = [
        (1000, "M"), (900, "CM"), (500, "D"), (400, "CD"),
        (100, "C"), (90, "XC"), (50, "L"), (40, "XL"),
        (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I"),
    ]
    result = ""
    for value, numeral in numerals:
        while n >= value:
            result += numeral
            n -= value
    return result


# convert a Roman numeral to an integer
def from_roman(text):
    """Convert a Roman numeral to an integer."""
    values = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100, "D": 500, "M": 1000}
    total = 0
    previous = 0
    for letter in reversed(text):
        value = values[letter]
        if value < previous:
            total -= value
        else:
            total += value
        previous = value
    return total


# area of a circle
import math

def circle_area(radius):
    """Return the area of a circle."""
    return math.pi * radius ** 2


# area of a rectangle
def rectangle_area(width, height):
    """Return the area of a rectangle."""
    return width * height


# distance between two points
import math

def distance(x1, y1, x2, y2):
    """Return the distance between two points."""
    return math.sqrt((x2 - x1) ** 2 + (y2 - y1) ** 2)


# solve a quadratic equation
import math

def solve_quadratic(a, b, c):
    """Return the real solutions of a*x**2 + b*x + c == 0."""
    discriminant = b * b - 4 * a * c
    if discriminant < 0:
        return []
    root = math.sqrt(discriminant)
    return sorted({(-b - root) / (2 * a), (-b + root) / (2 * a)})


# average of a list
# mean of a list of numbers
def average(numbers):
    """Return the average of a list of numbers."""
    if not numbers:
        return 0
    return sum(numbers) / len(numbers)


# median of a list
def median(numbers):
    """Return the median of a list of numbers."""
    ordered = sorted(numbers)
    middle = len(ordered) // 2
    if len(ordered) % 2 == 1:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2


# most common element
def mode(values):
    """Return the most common value in a list."""
    return max(set(values), key=values.count)


# variance and standard deviation
import math

def standard_deviation(numbers):
    """Return the standard deviation of a list of numbers."""
    mean = sum(numbers) / len(numbers)
    variance = sum((x - mean) ** 2 for x in numbers) / len(numbers)
    return math.sqrt(variance)


# sum of a list
# add all numbers in a list
def sum_list(numbers):
    """Return the sum of the numbers in a list."""
    total = 0
    for number in numbers:
        total += number
    return total


# product of a list
def product(numbers):
    """Return the product of the numbers in a list."""
    result = 1
    for number in numbers:
        result *= number
    return result


# maximum of a list
# largest number in a list
def find_max(numbers):
    """Return the largest number in a list."""
    largest = numbers[0]
    for number in numbers:
        if number > largest:
            largest = number
    return largest


# minimum of a list
# smallest number in a list
def find_min(numbers):
    """Return the smallest number in a list."""
    smallest = numbers[0]
    for number in numbers:
        if number < smallest:
            smallest = number
    return smallest


# running total
def cumulative_sum(numbers):
    """Return the running totals of a list of numbers."""
    totals = []
    total = 0
    for number in numbers:
        total += number
        totals.append(total)
    return totals


# reverse a string
def reverse_string(text):
    """Return the text reversed."""
    return text[::-1]


# reverse a list
def reverse_list(items):
    """Return a new list with the items in reverse order."""
    result = []
    for item in items:
        result.insert(0, item)
    return result


# palindrome check
# check if a string is a palindrome
def is_palindrome(text):
    """Check whether the text reads the same backwards."""
    letters = [c.lower() for c in text if c.isalnum()]
    return letters == letters[::-1]


# anagram check
# check if two strings are anagrams
def is_anagram(first, second):
    """Check whether two words are anagrams of each other."""
    return sorted(first.lower()) == sorted(second.lower())


# count the vowels in a string
def count_vowels(text):
    """Return the number of vowels in the text."""
    count = 0
    for letter in text.lower():
        if letter in "aeiou":
            count += 1
    return count


# count words in a text
# word count
def count_words(text):
    """Count how often each word occurs in the text."""
    counts = {}
    for word in text.lower().split():
        counts[word] = counts.get(word, 0) + 1
    return counts


# count characters
# letter frequency
def count_letters(text):
    """Count how often each letter occurs in the text."""
    counts = {}
    for letter in text:
        if letter in counts:
            counts[letter] += 1
        else:
            counts[letter] = 1
    return counts


# longest word in a sentence
def longest_word(sentence):
    """Return the longest word in a sentence."""
    return max(sentence.split(), key=len)


# capitalize every word
# title case
def capitalize_words(text):
    """Capitalize the first letter of every word."""
    return " ".join(word.capitalize() for word in text.split())


# remove vowels from a string
def remove_vowels(text):
    """Return the text without its vowels."""
    return "".join(c for c in text if c.lower() not in "aeiou")


# convert camel case to snake case
def to_snake_case(name):
    """Convert a CamelCase name to snake_case."""
    result = ""
    for i, letter in enumerate(name):
        if letter.isupper() and i > 0:
            result += "_"
        result += letter.lower()
    return result


# convert snake case to camel case
def to_camel_case(name):
    """Convert a snake_case name to CamelCase."""
    return "".join(part.capitalize() for part in name.split("_"))


# caesar cipher
# shift letters of a text
def caesar_cipher(text, shift):
    """Encrypt the text by shifting each letter."""
    result = ""
    for letter in text:
        if letter.isalpha():
            start = ord("A") if letter.isupper() else ord("a")
            result += chr((ord(letter) - start + shift) % 26 + start)
        else:
            result += letter
    return result


# run-length encoding
def run_length_encode(text):
    """Encode the text as a list of (letter, count) pairs."""
    runs = []
    for letter in text:
        if runs and runs[-1][0] == letter:
            runs[-1] = (letter, runs[-1][1] + 1)
        else:
            runs.append((letter, 1))
    return runs


# run-length decoding
def run_length_decode(runs):
    """Decode a list of (letter, count) pairs."""
    return "".join(letter * count for letter, count in runs)


# slugify a title
import re

def slugify(title):
    """Turn a title into a string that can be used in a URL."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


# validate an email address
import re

def is_valid_email(address):
    """Check whether the text looks like an email address."""
    return re.fullmatch(r"[\w.+-]+@[\w-]+\.[\w.-]+", address) is not None


# find all numbers in a text
import re

def extract_numbers(text):
    """Return all integers that occur in the text."""
    return [int(match) for match in re.findall(r"-?\d+", text)]


# linear search
def linear_search(items, target):
    """Return the index of target in items, or -1."""
    for i, item in enumerate(items):
        if item == target:
            return i
    return -1


# binary search
# search in a sorted list
def binary_search(items, target):
    """Return the index of target in a sorted list, or -1."""
    low = 0
    high = len(items) - 1
    while low <= high:
        middle = (low + high) // 2
        if items[middle] == target:
            return middle
        if items[middle] < target:
            low = middle + 1
        else:
            high = middle - 1
    return -1


# bubble sort
# sort a list with bubble sort
def bubble_sort(items):
    """Sort a list in place with bubble sort."""
    n = len(items)
    for i in range(n):
        swapped = False
        for j in range(n - i - 1):
            if items[j] > items[j + 1]:
                items[j], items[j + 1] = items[j + 1], items[j]
                swapped = True
        if not swapped:
            break
    return items


# insertion sort
def insertion_sort(items):
    """Sort a list in place with insertion sort."""
    for i in range(1, len(items)):
        value = items[i]
        j = i - 1
        while j >= 0 and items[j] > value:
            items[j + 1] = items[j]
            j -= 1
        items[j + 1] = value
    return items


# selection sort
def selection_sort(items):
    """Sort a list in place with selection sort."""
    for i in range(len(items)):
        smallest = i
        for j in range(i + 1, len(items)):
            if items[j] < items[smallest]:
                smallest = j
        items[i], items[smallest] = items[smallest], items[i]
    return items


# quicksort
# quick sort
# sort a list
# sort a list of numbers
def quicksort(items):
    """Return a sorted copy of a list, using quicksort."""
    if len(items) <= 1:
        return items
    pivot = items[len(items) // 2]
    left = [x for x in items if x < pivot]
    middle = [x for x in items if x == pivot]
    right = [x for x in items if x > pivot]
    return quicksort(left) + middle + quicksort(right)


# merge sort
def merge_sort(items):
    """Return a sorted copy of a list, using merge sort."""
    if len(items) <= 1:
        return items
    middle = len(items) // 2
    left = merge_sort(items[:middle])
    right = merge_sort(items[middle:])
    return merge(left, right)


# merge two sorted lists
def merge(left, right):
    """Merge two sorted lists into one sorted list."""
    result = []
    i = j = 0
    while i < len(left) and j < len(right):
        if left[i] <= right[j]:
            result.append(left[i])
            i += 1
        else:
            result.append(right[j])
            j += 1
    return result + left[i:] + right[j:]


# heap sort
import heapq

def heap_sort(items):
    """Return a sorted copy of a list, using a heap."""
    heap = list(items)
    heapq.heapify(heap)
    return [heapq.heappop(heap) for _ in range(len(heap))]


# check if a list is sorted
def is_sorted(items):
    """Check whether the items are in ascending order."""
    return all(a <= b for a, b in zip(items, items[1:]))


# remove duplicates from a list
# unique elements of a list
def unique(items):
    """Return the items without duplicates, in their order."""
    seen = set()
    result = []
    for item in items:
        if item not in seen:
            seen.add(item)
            result.append(item)
    return result


# find duplicates in a list
def find_duplicates(items):
    """Return the set of items that occur more than once."""
    seen = set()
    duplicates = set()
    for item in items:
        if item in seen:
            duplicates.add(item)
        seen.add(item)
    return duplicates


# flatten a nested list
def flatten(items):
    """Flatten a nested list into a single list."""
    result = []
    for item in items:
        if isinstance(item, list):
            result.extend(flatten(item))
        else:
            result.append(item)
    return result


# split a list into chunks
def chunks(items, size):
    """Split a list into pieces of the given size."""
    return [items[i:i + size] for i in range(0, len(items), size)]


# rotate a list
def rotate(items, k):
    """Rotate a list to the right by k places."""
    if not items:
        return items
    k %= len(items)
    return items[-k:] + items[:-k]


# filter even numbers
def even_numbers(numbers):
    """Return only the even numbers of a list."""
    return [number for number in numbers if number % 2 == 0]


# squares of a list
def squares(numbers):
    """Return a list with the square of each number."""
    return [number ** 2 for number in numbers]


# two sum
# find two numbers that add up to a target
def two_sum(numbers, target):
    """Return the indices of two numbers that add up to target."""
    seen = {}
    for i, number in enumerate(numbers):
        if target - number in seen:
            return seen[target - number], i
        seen[number] = i
    return None


# second largest number
def second_largest(numbers):
    """Return the second largest number in a list."""
    return sorted(set(numbers))[-2]


# maximum subarray
# Kadane's algorithm
def max_subarray_sum(numbers):
    """Return the largest sum of a contiguous subarray."""
    best = current = numbers[0]
    for number in numbers[1:]:
        current = max(number, current + number)
        best = max(best, current)
    return best


# all permutations
def permutations(items):
    """Return all permutations of a list."""
    if len(items) <= 1:
        return [items]
    result = []
    for i, item in enumerate(items):
        rest = items[:i] + items[i + 1:]
        for permutation in permutations(rest):
            result.append([item] + permutation)
    return result


# all subsets
# power set
def subsets(items):
    """Return all subsets of a list."""
    result = [[]]
    for item in items:
        result += [subset + [item] for subset in result]
    return result


# pascal's triangle
def pascal_triangle(n):
    """Return the first n rows of Pascal's triangle."""
    rows = []
    row = [1]
    for _ in range(n):
        rows.append(row)
        row = [1] + [a + b for a, b in zip(row, row[1:])] + [1]
    return rows


# matrix multiplication
# multiply two matrices
def matrix_multiply(a, b):
    """Return the product of two matrices."""
    rows, inner, columns = len(a), len(b), len(b[0])
    result = [[0] * columns for _ in range(rows)]
    for i in range(rows):
        for j in range(columns):
            for k in range(inner):
                result[i][j] += a[i][k] * b[k][j]
    return result


# transpose a matrix
def transpose(matrix):
    """Return the transpose of a matrix."""
    return [list(column) for column in zip(*matrix)]


# identity matrix
def identity_matrix(n):
    """Return the n by n identity matrix."""
    return [[1 if i == j else 0 for j in range(n)] for i in range(n)]


# dot product of two vectors
def dot_product(a, b):
    """Return the dot product of two vectors."""
    return sum(x * y for x, y in zip(a, b))


# merge two dictionaries
def merge_dicts(first, second):
    """Return a dictionary with the entries of both."""
    result = dict(first)
    result.update(second)
    return result


# invert a dictionary
def invert_dict(mapping):
    """Return a dictionary with keys and values swapped."""
    return {value: key for key, value in mapping.items()}


# sort a dictionary by value
def sort_by_value(mapping):
    """Return the items of a dictionary, sorted by value."""
    return sorted(mapping.items(), key=lambda item: item[1])


# group items by a key
from collections import defaultdict

def group_by(items, key):
    """Group the items by the value of a key function."""
    groups = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return dict(groups)


# towers of Hanoi
def hanoi(n, source, target, spare):
    """Print the moves that solve the Towers of Hanoi."""
    if n == 0:
        return
    hanoi(n - 1, source, spare, target)
    print("Move disk", n, "from", source, "to", target)
    hanoi(n - 1, spare, target, source)


# n queens
def solve_queens(n):
    """Return a solution of the n queens problem."""
    def place(queens):
        row = len(queens)
        if row == n:
            return queens
        for column in range(n):
            if all(column != c and abs(column - c) != row - r
                   for r, c in enumerate(queens)):
                solution = place(queens + [column])
                if solution:
                    return solution
        return None

    return place([])


# longest common subsequence
def longest_common_subsequence(a, b):
    """Return the length of the longest common subsequence."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i in range(len(a)):
        for j in range(len(b)):
            if a[i] == b[j]:
                table[i + 1][j + 1] = table[i][j] + 1
            else:
                table[i + 1][j + 1] = max(table[i][j + 1], table[i + 1][j])
    return table[len(a)][len(b)]


# Levenshtein distance
# edit distance between two strings
def edit_distance(a, b):
    """Return the edit distance between two strings."""
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        current = [i]
        for j, y in enumerate(b, 1):
            cost = 0 if x == y else 1
            current.append(min(previous[j] + 1, current[-1] + 1, previous[j - 1] + cost))
        previous = current
    return previous[-1]


# coin change
def coin_change(coins, amount):
    """Return the smallest number of coins that make the amount."""
    best = [0] + [float("inf")] * amount
    for value in range(1, amount + 1):
        for coin in coins:
            if coin <= value:
                best[value] = min(best[value], best[value - coin] + 1)
    return best[amount] if best[amount] != float("inf") else -1


# check for balanced parentheses
# valid brackets
def is_balanced(text):
    """Check whether the brackets in the text are balanced."""
    pairs = {")": "(", "]": "[", "}": "{"}
    stack = []
    for letter in text:
        if letter in "([{":
            stack.append(letter)
        elif letter in pairs:
            if not stack or stack.pop() != pairs[letter]:
                return False
    return not stack


# breadth-first search
# BFS on a graph
from collections import deque

def bfs(graph, start):
    """Return the nodes of a graph in breadth-first order."""
    visited = {start}
    queue = deque([start])
    order = []
    while queue:
        node = queue.popleft()
        order.append(node)
        for neighbor in graph[node]:
            if neighbor not in visited:
                visited.add(neighbor)
                queue.append(neighbor)
    return order


# depth-first search
# DFS on a graph
def dfs(graph, start, visited=None):
    """Return the nodes of a graph in depth-first order."""
    if visited is None:
        visited = []
    visited.append(start)
    for neighbor in graph[start]:
        if neighbor not in visited:
            dfs(graph, neighbor, visited)
    return visited


# shortest path
# Dijkstra's algorithm
import heapq

def dijkstra(graph, start):
    """Return the shortest distance from start to every node."""
    distances = {start: 0}
    heap = [(0, start)]
    while heap:
        distance, node = heapq.heappop(heap)
        if distance > distances[node]:
            continue
        for neighbor, weight in graph[node].items():
            candidate = distance + weight
            if candidate < distances.get(neighbor, float("inf")):
                distances[neighbor] = candidate
                heapq.heappush(heap, (candidate, neighbor))
    return distances


# topological sort
def topological_sort(graph):
    """Return the nodes of a directed graph in topological order."""
    visited = set()
    order = []

    def visit(node):
        if node in visited:
            return
        visited.add(node)
        for neighbor in graph.get(node, []):
            visit(neighbor)
        order.append(node)

    for node in graph:
        visit(node)
    return order[::-1]


# stack class
# a stack data structure
# Write a stack.
class Stack:
    """A last-in, first-out stack."""

    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
        if self.is_empty():
            raise IndexError("pop from an empty stack")
        return self.items.pop()

    def peek(self):
        return self.items[-1]

    def is_empty(self):
        return len(self.items) == 0

    def __len__(self):
        return len(self.items)


# queue class
# a queue data structure
# Write a queue.
from collections import deque

class Queue:
    """A first-in, first-out queue."""

    def __init__(self):
        self.items = deque()

    def enqueue(self, item):
        self.items.append(item)

    def dequeue(self):
        if not self.items:
            raise IndexError("dequeue from an empty queue")
        return self.items.popleft()

    def is_empty(self):
        return not self.items

    def __len__(self):
        return len(self.items)


# a priority queue
import heapq

class PriorityQueue:
    """A queue that returns the item with the lowest priority first."""

    def __init__(self):
        self.heap = []
        self.count = 0

    def push(self, item, priority):
        heapq.heappush(self.heap, (priority, self.count, item))
        self.count += 1

    def pop(self):
        return heapq.heappop(self.heap)[-1]

    def __len__(self):
        return len(self.heap)


# a linked list
# singly linked list
class Node:
    """A node of a linked list."""

    def __init__(self, value, next=None):
        self.value = value
        self.next = next


# linked list class
# Implement a linked list.
class LinkedList:
    """A singly linked list."""

    def __init__(self):
        self.head = None
        self.size = 0

    def prepend(self, value):
        self.head = Node(value, self.head)
        self.size += 1

    def append(self, value):
        if self.head is None:
            self.prepend(value)
            return
        node = self.head
        while node.next is not None:
            node = node.next
        node.next = Node(value)
        self.size += 1

    def __iter__(self):
        node = self.head
        while node is not None:
            yield node.value
            node = node.next

    def __len__(self):
        return self.size


# reverse a linked list
def reverse_linked_list(head):
    """Reverse a linked list and return its new head."""
    previous = None
    while head is not None:
        head.next, previous, head = previous, head, head.next
    return previous


# binary tree node
class TreeNode:
    """A node of a binary tree."""

    def __init__(self, value, left=None, right=None):
        self.value = value
        self.left = left
        self.right = right


# binary search tree
# Implement a binary search tree.
class BinarySearchTree:
    """A binary search tree."""

    def __init__(self):
        self.root = None

    def insert(self, value):
        if self.root is None:
            self.root = TreeNode(value)
            return
        node = self.root
        while True:
            if value < node.value:
                if node.left is None:
                    node.left = TreeNode(value)
                    return
                node = node.left
            else:
                if node.right is None:
                    node.right = TreeNode(value)
                    return
                node = node.right

    def __contains__(self, value):
        node = self.root
        while node is not None:
            if value == node.value:
                return True
            node = node.left if value < node.value else node.right
        return False


# height of a binary tree
def tree_height(node):
    """Return the height of a binary tree."""
    if node is None:
        return 0
    return 1 + max(tree_height(node.left), tree_height(node.right))


# in-order traversal of a tree
def inorder(node):
    """Yield the values of a binary tree in order."""
    if node is not None:
        yield from inorder(node.left)
        yield node.value
        yield from inorder(node.right)


# trie
# prefix tree
class Trie:
    """A prefix tree of words."""

    def __init__(self):
        self.children = {}
        self.is_word = False

    def insert(self, word):
        node = self
        for letter in word:
            node = node.children.setdefault(letter, Trie())
        node.is_word = True

    def search(self, word):
        node = self
        for letter in word:
            if letter not in node.children:
                return False
            node = node.children[letter]
        return node.is_word


# LRU cache
# least recently used cache
from collections import OrderedDict

class LRUCache:
    """A cache that drops the least recently used entry."""

    def __init__(self, capacity):
        self.capacity = capacity
        self.entries = OrderedDict()

    def get(self, key, default=None):
        if key not in self.entries:
            return default
        self.entries.move_to_end(key)
        return self.entries[key]

    def put(self, key, value):
        self.entries[key] = value
        self.entries.move_to_end(key)
        if len(self.entries) > self.capacity:
            self.entries.popitem(last=False)


# undirected graph
class Graph:
    """An undirected graph."""

    def __init__(self):
        self.edges = {}

    def add_node(self, node):
        self.edges.setdefault(node, set())

    def add_edge(self, a, b):
        self.add_node(a)
        self.add_node(b)
        self.edges[a].add(b)
        self.edges[b].add(a)

    def neighbors(self, node):
        return self.edges.get(node, set())


# union find
# disjoint set
class DisjointSet:
    """A union-find structure over hashable items."""

    def __init__(self, items):
        self.parent = {item: item for item in items}

    def find(self, item):
        while self.parent[item] != item:
            item = self.parent[item]
        return item

    def union(self, a, b):
        self.parent[self.find(a)] = self.find(b)


# a point in the plane
class Point:
    """A point in the plane."""

    def __init__(self, x, y):
        self.x = x
        self.y = y

    def __add__(self, other):
        return Point(self.x + other.x, self.y + other.y)

    def __eq__(self, other):
        return (self.x, self.y) == (other.x, other.y)

    def __repr__(self):
        return f"Point({self.x}, {self.y})"


# a person class
class Person:
    """A person with a name and an age."""

    def __init__(self, name, age):
        self.name = name
        self.age = age

    def greet(self):
        return f"Hello, my name is {self.name}."

    def __repr__(self):
        return f"Person({self.name!r}, {self.age})"


# a bank account
class BankAccount:
    """A bank account with a balance."""

    def __init__(self, owner, balance=0):
        self.owner = owner
        self.balance = balance

    def deposit(self, amount):
        if amount <= 0:
            raise ValueError("amount must be positive")
        self.balance += amount

    def withdraw(self, amount):
        if amount > self.balance:
            raise ValueError("not enough money")
        self.balance -= amount


# animal class with inheritance
class Animal:
    """An animal that can make a sound."""

    def __init__(self, name):
        self.name = name

    def speak(self):
        raise NotImplementedError


# dog class
class Dog:
    """A dog that can bark."""

    def __init__(self, name):
        self.name = name

    def speak(self):
        return f"{self.name} says woof!"


# a counter class
class Counter:
    """A counter that can go up and down."""

    def __init__(self, start=0):
        self.value = start

    def increment(self, step=1):
        self.value += step

    def decrement(self, step=1):
        self.value -= step

    def reset(self):
        self.value = 0


# rectangle class
class Rectangle:
    """A rectangle with a width and a height."""

    def __init__(self, width, height):
        self.width = width
        self.height = height

    def area(self):
        return self.width * self.height

    def perimeter(self):
        return 2 * (self.width + self.height)


# circle class
import math

class Circle:
    """A circle with a radius."""

    def __init__(self, radius):
        self.radius = radius

    def area(self):
        return math.pi * self.radius ** 2

    def circumference(self):
        return 2 * math.pi * self.radius


# a vector class
class Vector:
    """A vector in two dimensions."""

    def __init__(self, x, y):
        self.x = x
        self.y = y

    def __add__(self, other):
        return Vector(self.x + other.x, self.y + other.y)

    def __mul__(self, scale):
        return Vector(self.x * scale, self.y * scale)

    def length(self):
        return (self.x ** 2 + self.y ** 2) ** 0.5


# timer context manager
import time

class Timer:
    """A context manager that measures elapsed time."""

    def __enter__(self):
        self.start = time.perf_counter()
        return self

    def __exit__(self, *exc_info):
        self.elapsed = time.perf_counter() - self.start


# shopping cart
class ShoppingCart:
    """A shopping cart with items and prices."""

    def __init__(self):
        self.items = []

    def add(self, name, price, quantity=1):
        self.items.append((name, price, quantity))

    def total(self):
        return sum(price * quantity for _, price, quantity in self.items)


# dataclass for a book
from dataclasses import dataclass

@dataclass
class Book:
    """A book with a title, an author and a year."""

    title: str
    author: str
    year: int


# timing decorator
# measure the time of a function
import functools
import time

def timed(func):
    """Print how long each call of a function takes."""
    @functools.wraps(func)
    def wrapper(*args, **kwargs):
        start = time.perf_counter()
        result = func(*args, **kwargs)
        print(f"{func.__name__} took {time.perf_counter() - start:.3f} s")
        return result
    return wrapper


# retry decorator
import functools
import time

def retry(times, delay=1.0):
    """Call a function again when it raises an exception."""
    def decorator(func):
        @functools.wraps(func)
        def wrapper(*args, **kwargs):
            for attempt in range(times):
                try:
                    return func(*args, **kwargs)
                except Exception:
                    if attempt == times - 1:
                        raise
                    time.sleep(delay)
        return wrapper
    return decorator


# memoize decorator
# cache the results of a function
import functools

def memoize(func):
    """Remember the results of a function."""
    cache = {}

    @functools.wraps(func)
    def wrapper(*args):
        if args not in cache:
            cache[args] = func(*args)
        return cache[args]
    return wrapper


# read a file
def read_file(path):
    """Return the contents of a text file."""
    with open(path, encoding="utf-8") as file:
        return file.read()


# read the lines of a file
def read_lines(path):
    """Return the lines of a text file."""
    with open(path, encoding="utf-8") as file:
        return [line.rstrip("\n") for line in file]


# write a file
# write text to a file
def write_file(path, text):
    """Write the text to a file."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


# count the lines of a file
def count_lines(path):
    """Return the number of lines in a file."""
    with open(path, encoding="utf-8") as file:
        return sum(1 for _ in file)


# copy a file
def copy_file(source, target):
    """Copy the contents of one file to another."""
    with open(source, "rb") as infile, open(target, "wb") as outfile:
        while True:
            block = infile.read(65536)
            if not block:
                break
            outfile.write(block)


# list files in a directory
import os

def list_files(directory):
    """Return the sorted names of the files in a directory."""
    return sorted(
        name for name in os.listdir(directory)
        if os.path.isfile(os.path.join(directory, name))
    )


# find all files with an extension
import os

def find_files(directory, extension):
    """Yield the paths of all files with the given extension."""
    for root, dirs, files in os.walk(directory):
        for name in files:
            if name.endswith(extension):
                yield os.path.join(root, name)


# size of a directory
import os

def directory_size(path):
    """Return the total size of the files below a directory."""
    total = 0
    for root, dirs, files in os.walk(path):
        for name in files:
            total += os.path.getsize(os.path.join(root, name))
    return total


# load a JSON file
# read JSON
import json

def load_json(path):
    """Load an object from a JSON file."""
    with open(path, encoding="utf-8") as file:
        return json.load(file)


# save a JSON file
# write JSON
import json

def save_json(path, data):
    """Save an object to a JSON file."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(data, file, indent=2)


# read a CSV file
import csv

def read_csv(path):
    """Return the rows of a CSV file as dictionaries."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# write a CSV file
import csv

def write_csv(path, rows):
    """Write a list of rows to a CSV file."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


# hash of a file
# checksum
import hashlib

def file_hash(path):
    """Return the SHA-256 hash of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(65536), b""):
            digest.update(block)
    return digest.hexdigest()


# download a web page
# fetch a URL
from urllib.request import urlopen

def fetch(url, timeout=10):
    """Return the body of a web page."""
    with urlopen(url, timeout=timeout) as response:
        return response.read().decode("utf-8")


# run a shell command
import subprocess

def run_command(command):
    """Run a command and return its output."""
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return result.stdout


# random password
# generate a password
import secrets
import string

def random_password(length=12):
    """Return a random password of the given length."""
    alphabet = string.ascii_letters + string.digits
    return "".join(secrets.choice(alphabet) for _ in range(length))


# shuffle a list
import random

def shuffle(items):
    """Shuffle a list in place."""
    for i in range(len(items) - 1, 0, -1):
        j = random.randint(0, i)
        items[i], items[j] = items[j], items[i]


# roll a die
# random number
import random

def roll_dice(count=1, sides=6):
    """Return the results of rolling some dice."""
    return [random.randint(1, sides) for _ in range(count)]


# days between two dates
from datetime import date

def days_between(start, end):
    """Return the number of days between two dates."""
    return abs((end - start).days)


# current date and time
# print the current time
from datetime import datetime

def current_time():
    """Return the current date and time as text."""
    return datetime.now().strftime("%Y-%m-%d %H:%M:%S")


# format seconds as hours, minutes and seconds
def format_duration(seconds):
    """Format a number of seconds as hours, minutes and seconds."""
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{seconds:02d}"


# human readable file size
def format_size(size):
    """Format a number of bytes for people to read."""
    for unit in ["B", "KB", "MB", "GB"]:
        if size < 1024:
            return f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TB"


# clamp a value
def clamp(value, low, high):
    """Limit a value to the range from low to high."""
    return max(low, min(value, high))


# swap two values
def swap(a, b):
    """Return the two values in the other order."""
    return b, a


# say hello
# greet someone
def greet(name):
    """Return a greeting for the given name."""
    return f"Hello, {name}!"


# multiplication table
def multiplication_table(n):
    """Print the multiplication table up to n."""
    for i in range(1, n + 1):
        print(" ".join(f"{i * j:4d}" for j in range(1, n + 1)))


# print a triangle of stars
# print a pyramid
def print_triangle(height):
    """Print a triangle of stars."""
    for i in range(1, height + 1):
        print(" " * (height - i) + "*" * (2 * i - 1))


# count down
# countdown
def countdown(n):
    """Print the numbers from n down to 1."""
    while n > 0:
        print(n)
        n -= 1
    print("Liftoff!")


# guess the number game
# number guessing game
import random

def guessing_game(limit=100):
    """Let the user guess a random number."""
    secret = random.randint(1, limit)
    while True:
        guess = int(input("Your guess: "))
        if guess < secret:
            print("Too low.")
        elif guess > secret:
            print("Too high.")
        else:
            print("You got it!")
            break


# rock paper scissors
import random

def rock_paper_scissors(player):
    """Play rock, paper, scissors against the computer."""
    beats = {"rock": "scissors", "paper": "rock", "scissors": "paper"}
    computer = random.choice(list(beats))
    if player == computer:
        return "draw"
    return "win" if beats[player] == computer else "lose"


# simple calculator
def calculate(a, operator, b):
    """Apply an arithmetic operator to two numbers."""
    if operator == "+":
        return a + b
    if operator == "-":
        return a - b
    if operator == "*":
        return a * b
    if operator == "/":
        return a / b
    raise ValueError(f"unknown operator: {operator}")


# game of life
def life_step(cells):
    """Return the next generation in the Game of Life."""
    counts = {}
    for x, y in cells:
        for dx in (-1, 0, 1):
            for dy in (-1, 0, 1):
                if dx or dy:
                    key = (x + dx, y + dy)
                    counts[key] = counts.get(key, 0) + 1
    return {cell for cell, n in counts.items() if n == 3 or n == 2 and cell in cells}


# producer and consumer with threads
import threading

def run_in_threads(func, arguments):
    """Call a function in one thread per argument."""
    threads = [threading.Thread(target=func, args=(a,)) for a in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# asyncio example
# run tasks concurrently
import asyncio

async def gather_all(coroutines):
    """Run several coroutines at once and return their results."""
    return await asyncio.gather(*coroutines)


# a simple web server
# HTTP server
from http.server import BaseHTTPRequestHandler, HTTPServer

class HelloHandler(BaseHTTPRequestHandler):
    """A request handler that says hello."""

    def do_GET(self):
        body = b"Hello, world!"
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


# parse command-line arguments
# argparse example
import argparse

def parse_args():
    """Parse the command-line arguments."""
    parser = argparse.ArgumentParser(description="Process some files.")
    parser.add_argument("files", nargs="*", help="the files to read")
    parser.add_argument("-v", "--verbose", action="store_true")
    return parser.parse_args()


# main function
# a script with a main function
def main():
    """Run the program."""
    args = parse_args()
    for path in args.files:
        if args.verbose:
            print("reading", path)
        print(read_file(path))


# unit test
# unittest example
import unittest

class FibonacciTest(unittest.TestCase):
    """Tests for the fibonacci function."""

    def test_first_numbers(self):
        self.assertEqual([fibonacci(n) for n in range(6)], [0, 1, 1, 2, 3, 5])

    def test_large_number(self):
        self.assertEqual(fibonacci(50), 12586269025)


# a car class
class Car:
    """A car that can drive."""

    def __init__(self, make, model, year):
        self.make = make
        self.model = model
        self.year = year
        self.mileage = 0

    def drive(self, distance):
        self.mileage += distance

    def __str__(self):
        return f"{self.year} {self.make} {self.model}"


# a student class
class Student:
    """A student with a name and a list of grades."""

    def __init__(self, name):
        self.name = name
        self.grades = []

    def add_grade(self, grade):
        self.grades.append(grade)

    def average(self):
        if not self.grades:
            return 0
        return sum(self.grades) / len(self.grades)


# employee class
class Employee:
    """An employee with a name and a salary."""

    def __init__(self, name, salary):
        self.name = name
        self.salary = salary

    def give_raise(self, percent):
        self.salary += self.salary * percent / 100

    def __repr__(self):
        return f"Employee({self.name!r}, {self.salary})"


# matrix class
class Matrix:
    """A matrix of numbers."""

    def __init__(self, rows):
        self.rows = rows

    def __add__(self, other):
        return Matrix([
            [x + y for x, y in zip(row, other_row)]
            for row, other_row in zip(self.rows, other.rows)
        ])

    def __mul__(self, other):
        columns = list(zip(*other.rows))
        return Matrix([
            [sum(x * y for x, y in zip(row, column)) for column in columns]
            for row in self.rows
        ])

    def transpose(self):
        return Matrix([list(column) for column in zip(*self.rows)])


# a TCP server
# echo server
import socket

class Server:
    """A server that sends back what it receives."""

    def __init__(self, host, port):
        self.host = host
        self.port = port

    def run(self):
        with socket.create_server((self.host, self.port)) as server:
            while True:
                connection, address = server.accept()
                with connection:
                    self.handle(connection)

    def handle(self, connection):
        while True:
            data = connection.recv(1024)
            if not data:
                break
            connection.sendall(data)


# a TCP client
import socket

class Client:
    """A client that talks to a server."""

    def __init__(self, host, port):
        self.host = host
        self.port = port
        self.socket = None

    def connect(self):
        self.socket = socket.create_connection((self.host, self.port))

    def send(self, message):
        self.socket.sendall(message.encode("utf-8"))

    def receive(self):
        return self.socket.recv(4096).decode("utf-8")

    def close(self):
        self.socket.close()


# a simple cache
class Cache:
    """A cache that computes missing values."""

    def __init__(self, compute):
        self.compute = compute
        self.values = {}

    def get(self, key):
        if key not in self.values:
            self.values[key] = self.compute(key)
        return self.values[key]

    def clear(self):
        self.values.clear()


# configuration class
import json

class Config:
    """Settings that are kept in a JSON file."""

    def __init__(self, path):
        self.path = path
        self.values = {}

    def load(self):
        with open(self.path, encoding="utf-8") as file:
            self.values = json.load(file)

    def save(self):
        with open(self.path, "w", encoding="utf-8") as file:
            json.dump(self.values, file, indent=2)

    def get(self, name, default=None):
        return self.values.get(name, default)


# a logger class
from datetime import datetime

class Logger:
    """A logger that writes messages to a file."""

    def __init__(self, path):
        self.path = path

    def log(self, message):
        time = datetime.now().isoformat(timespec="seconds")
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(f"{time} {message}\n")


# inventory class
class Inventory:
    """An inventory that counts items."""

    def __init__(self):
        self.items = {}

    def add(self, name, quantity=1):
        self.items[name] = self.items.get(name, 0) + quantity

    def remove(self, name, quantity=1):
        if self.items.get(name, 0) < quantity:
            raise ValueError(f"not enough {name}")
        self.items[name] -= quantity

    def __contains__(self, name):
        return self.items.get(name, 0) > 0


# a player in a game
class Player:
    """A player with health and a score."""

    def __init__(self, name, health=100):
        self.name = name
        self.health = health
        self.score = 0

    def take_damage(self, amount):
        self.health = max(0, self.health - amount)

    def is_alive(self):
        return self.health > 0


# event emitter
# observer pattern
class EventEmitter:
    """An object that calls functions when events happen."""

    def __init__(self):
        self.handlers = {}

    def on(self, event, handler):
        self.handlers.setdefault(event, []).append(handler)

    def emit(self, event, *args):
        for handler in self.handlers.get(event, []):
            handler(*args)


# iterator class
class Countdown:
    """An iterator that counts down to 1."""

    def __init__(self, start):
        self.current = start

    def __iter__(self):
        return self

    def __next__(self):
        if self.current <= 0:
            raise StopIteration
        self.current -= 1
        return self.current + 1


# a min heap
class MinHeap:
    """A binary heap with the smallest item first."""

    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)
        i = len(self.items) - 1
        while i > 0 and self.items[i] < self.items[(i - 1) // 2]:
            parent = (i - 1) // 2
            self.items[i], self.items[parent] = self.items[parent], self.items[i]
            i = parent

    def peek(self):
        return self.items[0]

    def __len__(self):
        return len(self.items)


# user class
class User:
    """A user with a name and an email address."""

    def __init__(self, name, email):
        self.name = name
        self.email = email

    def __eq__(self, other):
        return self.email == other.email

    def __str__(self):
        return f"{self.name} <{self.email}>"


# read a configuration file
# parse a config file
def read_config(path):
    """Read a file of name = value lines into a dictionary."""
    config = {}
    with open(path, encoding="utf-8") as file:
        for line in file:
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            name, _, value = line.partition("=")
            config[name.strip()] = value.strip()
    return config


# count the words in a file
def count_words_in_file(path):
    """Return the number of words in a text file."""
    with open(path, encoding="utf-8") as file:
        return sum(len(line.split()) for line in file)


# search a file for a pattern
# grep
import re

def grep(pattern, path):
    """Yield the lines of a file that match a pattern."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            if re.search(pattern, line):
                yield line.rstrip("\n")


# replace text in a file
def replace_in_file(path, old, new):
    """Replace every occurrence of a text in a file."""
    with open(path, encoding="utf-8") as file:
        text = file.read()
    with open(path, "w", encoding="utf-8") as file:
        file.write(text.replace(old, new))


# create a directory
# make a folder
import os

def make_directory(path):
    """Create a directory unless it exists already."""
    os.makedirs(path, exist_ok=True)


# delete a file
import os

def remove_file(path):
    """Delete a file if it exists."""
    if os.path.exists(path):
        os.remove(path)


# file extension
import os

def get_extension(path):
    """Return the extension of a file name, in lower case."""
    return os.path.splitext(path)[1].lower()


# environment variable
import os

def get_env(name, default=None):
    """Return the value of an environment variable."""
    return os.environ.get(name, default)


# rename all files in a directory
import os

def rename_files(directory, prefix):
    """Put a prefix before the names of all files in a directory."""
    for name in os.listdir(directory):
        source = os.path.join(directory, name)
        target = os.path.join(directory, prefix + name)
        os.rename(source, target)


# newest file in a directory
import os

def newest_file(directory):
    """Return the path of the newest file in a directory."""
    paths = [os.path.join(directory, name) for name in os.listdir(directory)]
    return max(paths, key=os.path.getmtime)


# print a directory tree
import os

def print_tree(path, indent=0):
    """Print the files below a directory as a tree."""
    for name in sorted(os.listdir(path)):
        print("    " * indent + name)
        child = os.path.join(path, name)
        if os.path.isdir(child):
            print_tree(child, indent + 1)


# print an error and exit
import sys

def fail(message):
    """Print an error message and leave the program."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)


# sum the numbers given on the command line
import sys

def sum_arguments():
    """Print the sum of the command-line arguments."""
    print(sum(float(argument) for argument in sys.argv[1:]))


# connect to a server
import socket

def is_port_open(host, port, timeout=1.0):
    """Check whether a server accepts connections on a port."""
    try:
        with socket.create_connection((host, port), timeout=timeout):
            return True
    except OSError:
        return False


# create a database table
# sqlite example
import sqlite3

def save_users(path, users):
    """Save a list of users in a database."""
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS users (name TEXT, age INTEGER)")
        connection.executemany("INSERT INTO users VALUES (?, ?)", users)


# parse a query string
def parse_query(query):
    """Parse a query string into a dictionary."""
    result = {}
    for pair in query.split("&"):
        name, _, value = pair.partition("=")
        result[name] = value
    return result


# split text into words
# tokenizer
import re

def tokenize(text):
    """Split the text into words and punctuation."""
    return re.findall(r"\w+|[^\w\s]", text)


# parse an integer
def parse_int(text, default=None):
    """Convert the text to an integer, or return a default."""
    try:
        return int(text)
    except ValueError:
        return default


# intersection of two lists
def intersection(first, second):
    """Return the items that are in both lists."""
    return [item for item in first if item in second]


# count occurrences
def count_occurrences(items, target):
    """Return how often target occurs in a list."""
    count = 0
    for item in items:
        if item == target:
            count += 1
    return count


# cube of a number
def cube(x):
    """Return the cube of x."""
    return x ** 3


# sum of squares
def sum_of_squares(n):
    """Return the sum of the squares from 1 to n."""
    return sum(i * i for i in range(1, n + 1))


# compound interest
def compound_interest(principal, rate, years):
    """Return the value of savings after some years."""
    return principal * (1 + rate / 100) ** years


# triangular numbers
def triangular_number(n):
    """Return the sum of the numbers from 1 to n."""
    return n * (n + 1) // 2


# estimate pi
# Monte Carlo pi
import random

def estimate_pi(samples):
    """Estimate pi by drawing random points."""
    inside = 0
    for _ in range(samples):
        x, y = random.random(), random.random()
        if x * x + y * y <= 1:
            inside += 1
    return 4 * inside / samples


# random walk
import random

def random_walk(steps):
    """Return the positions of a random walk."""
    position = 0
    positions = [position]
    for _ in range(steps):
        position += random.choice([-1, 1])
        positions.append(position)
    return positions


# numerical derivative
def derivative(f, x, h=1e-6):
    """Approximate the derivative of f at x."""
    return (f(x + h) - f(x - h)) / (2 * h)


# numerical integration
def integrate(f, a, b, n=1000):
    """Approximate the integral of f from a to b."""
    width = (b - a) / n
    return width * sum(f(a + (i + 0.5) * width) for i in range(n))


# sigmoid function
import math

def sigmoid(x):
    """Return the logistic function of x."""
    return 1 / (1 + math.exp(-x))


# softmax
import math

def softmax(scores):
    """Turn a list of scores into probabilities."""
    largest = max(scores)
    weights = [math.exp(score - largest) for score in scores]
    total = sum(weights)
    return [weight / total for weight in weights]


# attention
# scaled dot-product attention
import math

def attention(query, keys, values):
    """Return the average of the values, weighted by attention."""
    scale = math.sqrt(len(query))
    weights = softmax([dot_product(query, key) / scale for key in keys])
    return [dot_product(weights, column) for column in zip(*values)]


# cosine similarity
import math

def cosine_similarity(a, b):
    """Return the cosine of the angle between two vectors."""
    norms = math.sqrt(dot_product(a, a)) * math.sqrt(dot_product(b, b))
    return dot_product(a, b) / norms


# linear regression
# fit a line
def fit_line(xs, ys):
    """Return the slope and intercept of the best line."""
    mean_x = sum(xs) / len(xs)
    mean_y = sum(ys) / len(ys)
    slope = (
        sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys))
        / sum((x - mean_x) ** 2 for x in xs)
    )
    return slope, mean_y - slope * mean_x


# mean squared error
def mean_squared_error(predictions, targets):
    """Return the mean of the squared differences."""
    return sum((p - t) ** 2 for p, t in zip(predictions, targets)) / len(targets)


# compose functions
def compose(f, g):
    """Return the function that applies g and then f."""
    return lambda x: f(g(x))


# debounce or rate limit
import time

class RateLimiter:
    """A limit on the number of calls per second."""

    def __init__(self, rate):
        self.interval = 1 / rate
        self.last = 0.0

    def wait(self):
        now = time.monotonic()
        pause = self.last + self.interval - now
        if pause > 0:
            time.sleep(pause)
        self.last = max(now, self.last + self.interval)


# worker threads with a queue
import threading

def start_worker(jobs):
    """Start a thread that runs jobs from a queue."""
    def work():
        while True:
            job = jobs.get()
            job()
            jobs.task_done()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


# print a calendar
import calendar

def print_month(year, month):
    """Print the calendar of a month."""
    print(calendar.month(year, month))


# age from a birthday
from datetime import date

def age_in_years(birthday):
    """Return the age in years of a person."""
    today = date.today()
    had_birthday = (today.month, today.day) >= (birthday.month, birthday.day)
    return today.year - birthday.year - (not had_birthday)


# hello world
# Print hello world.
# Write a hello world program.
print("Hello, world!")


# Print the numbers from 1 to 10.
# count to ten
for i in range(1, 11):
    print(i)


# Print the first ten squares.
for i in range(1, 11):
    print(i, i ** 2)


# Sum the numbers from 1 to 100.
total = sum(range(1, 101))
print(total)


# Make a list of even numbers.
evens = [n for n in range(20) if n % 2 == 0]
print(evens)


# Loop over a dictionary.
ages = {"Ada": 36, "Alan": 41, "Grace": 85}
for name, age in ages.items():
    print(name, "is", age)


# Handle an exception.
# try and except
try:
    value = int("forty-two")
except ValueError as error:
    print("not a number:", error)


# Hello
# Hi
# Hello!
# Hi there
# How are you?
print("Hello! Ask me for a small Python function.")


# Who are you?
# What are you?
# What is your name?
# What can you do?
# help
print("I am a very small language model.")
print("I learned Python from the standard library's source code.")


# Thanks
# Thank you!
print("You are welcome!")
